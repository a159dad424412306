"""Audit of a force field: scans, conformers, dimers, geometries and dynamics of small molecules."""
