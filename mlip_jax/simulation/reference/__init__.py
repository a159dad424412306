"""Energies and forces of a reference method, evaluated in parallel and cached."""
