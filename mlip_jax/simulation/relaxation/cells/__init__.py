"""Relaxation of periodic structures, with their cells or in fixed ones."""
