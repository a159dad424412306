"""Three formulas with six conformations from ANI-1x (CC0), via modelforge's test data (MIT)."""

from pathlib import Path


def make(folder: Path):
    return Path(__file__).parents[3] / "data" / "readers" / "ani" / "ani1x_small.hdf5", {}
