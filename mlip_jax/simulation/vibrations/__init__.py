"""Vibrational analysis of molecules: normal modes and thermochemistry."""
