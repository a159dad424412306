"""Reliability of a force field: its domain, and the calibrated spread of an ensemble."""
