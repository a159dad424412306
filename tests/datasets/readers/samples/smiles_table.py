"""Table of SMILES and invented properties, with a molecule that cannot be embedded."""

from pathlib import Path

TABLE = """\
SMILES,name,gap,remark,mu
O,water,8.5,good,1.85
CO,methanol,7.5,,
C1CC,broken,1.0,,1
OC,methanol again,7.4,,1.7
"""


def make(folder: Path):
    path = folder / "table.csv"
    path.write_text(TABLE)
    return path, {}


def add_label(path: Path):
    """Add a column with a number and a text, which is not a property."""
    header, *rows = path.read_text().splitlines()
    cells = ["3.5", "n/a", "", ""]
    lines = [f"{header},surplus", *(f"{row},{cell}" for row, cell in zip(rows, cells))]
    path.write_text("\n".join(lines) + "\n")
