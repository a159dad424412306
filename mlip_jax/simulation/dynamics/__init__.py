"""Molecular dynamics on the device: integrators, neighbor lists, the loop, trajectories and their analysis."""
