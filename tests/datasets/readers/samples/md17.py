"""Ten pairs of similar frames of ethanol and a split from rMD17 (figshare 12672038), via AIRS."""

from pathlib import Path


def make(folder: Path):
    return Path(__file__).parents[3] / "data" / "readers" / "md17" / "rmd17_ethanol.npz", {}
