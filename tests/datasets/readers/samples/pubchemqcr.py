"""Four complete relaxations in PubChemQCR's LMDB layout, computed with RDKit, ASE and tblite.

The molecules are from ZINC and SPICE (CC-BY-4.0 and MIT). GFN1-xTB replaces PM3, GFN2-xTB replaces
DFT.

1721 and 1813 have no nuclear charges, 2534 has them and capital symbols ("CL"), 3589 has DFT_1st =
None.
"""

import gzip
import json
import pickle
import shutil
from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "data" / "readers" / "pubchemqcr"


def records() -> dict[bytes, dict]:
    with gzip.open(DATA / "records.json.gz", "rt") as file:
        return {key.encode(): stages for key, stages in json.load(file).items()}


def write(path: Path, stored: dict, dump=pickle.dumps, compress=gzip.compress) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), subdir=False, lock=False, map_size=2**22) as environment:
        with environment.begin(write=True) as transaction:
            for key, stages in stored.items():
                transaction.put(key, compress(dump(stages)))
    return path


def make(folder: Path):
    shutil.copy(DATA / "summary.csv", folder / "summary.csv")
    return write(folder / "trajectories.lmdb", records()), {}
