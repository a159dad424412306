"""Cut from SPICE 1.1.4 (CC0): two charged molecules of three conformations."""

from pathlib import Path


def make(folder: Path):
    return Path(__file__).parents[3] / "data" / "spice_1.1.4_small.hdf5", {}
