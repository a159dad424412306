"""Molecular dynamics on the device: integrators, neighbor lists, the loop, and trajectories."""
