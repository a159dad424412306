"""Data checks (wrong units and signs, overlapping atoms, duplicates) and filters of structures."""
