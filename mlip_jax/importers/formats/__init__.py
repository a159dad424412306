"""File formats that several importers share."""
