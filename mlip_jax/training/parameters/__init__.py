"""Paths of parameters, and low-rank updates of linear maps."""
