"""Checks of data: wrong units and signs, overlapping atoms, duplicates, and filters that drop structures."""
