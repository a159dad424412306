"""Two charged molecules with three conformations each from SPICE 1.1.4 (CC0)."""

from pathlib import Path


def make(folder: Path):
    return Path(__file__).parents[3] / "data" / "spice_1.1.4_small.hdf5", {}
