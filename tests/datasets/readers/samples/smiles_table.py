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
