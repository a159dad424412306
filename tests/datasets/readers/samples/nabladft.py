"""Six rows of the test database of ∇²DFT's repository (github.com/AIRI-Institute/nablaDFT, MIT)."""

from pathlib import Path


def make(folder: Path):
    return Path(__file__).parents[3] / "data" / "readers" / "nabladft" / "test_database.db", {}
