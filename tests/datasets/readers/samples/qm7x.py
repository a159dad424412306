"""Two files in QM7-X's HDF5 layout with invented geometries and labels, near PBE0 energies.

tests/data/readers/qm7x/qm7x_small.npz has original structures: eight pairs from the padded example
file of thorben-frank/mlff (MIT). QM7-X itself is CC-BY 4.0.
"""

from pathlib import Path

import h5py
import numpy as np

ATOMS = {1: -13.641404161, 6: -1027.592489146, 8: -2039.734879322}
WATER = (np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]]))
METHANE = (
    np.array([6, 1, 1, 1, 1]),
    0.63 * np.array([[0.0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]),
)


def write_structure(file, key, numbers, positions, rng, **changes):
    """Write one structure. `changes` are fields; None omits a field."""
    n = len(numbers)
    fields = {
        "atNUM": numbers.astype(np.int64),
        "atXYZ": positions,
        "ePBE0+MBD": np.array([sum(ATOMS[int(z)] for z in numbers) - 4.2 * n + 0.1 * rng.normal()]),
        "ePBE0": np.array([-1.0]),
        "eMBD": np.array([-0.02]),
        "eAT": np.array([-99.0]),
        "totFOR": rng.normal(size=(n, 3)),
        "pbe0FOR": np.full((n, 3), 9.0),
        "vdwFOR": np.full((n, 3), 9.0),
        "eH": np.array([-8.0]),
        "eL": np.array([1.5]),
        "HLgap": np.array([9.5]),
        "vDIP": rng.normal(size=3),
        "DIP": np.array([0.4]),
        "mPOL": np.array([17.0]),
        "hCHG": rng.normal(size=(n, 1)),
        "hVOL": np.full(n, 20.0),
        "hRAT": np.full(n, 0.9),
        "atPOL": np.full((n, 1), 6.0),
    } | changes
    for name, value in fields.items():
        if value is not None:
            file[f"{key}/{name}"] = value


def make(folder: Path):
    rng = np.random.default_rng(0)
    path = folder / "qm7x"
    path.mkdir()
    with h5py.File(path / "1000.hdf5", "w") as file:
        for isomer in "12":
            for kind in ("d10", "d2", "opt"):
                write_structure(file, f"2/Geom-m2-i{isomer}-c1-{kind}", *METHANE, rng)
        for kind in ("opt", "1"):
            write_structure(
                file,
                f"10/Geom-m10-i1-c1-{kind}",
                WATER[0],
                WATER[1] + 0.01 * rng.normal(size=(3, 3)),
                rng,
            )
    with h5py.File(path / "2000.hdf5", "w") as file:
        write_structure(file, "1001/Geom-m1001-i1-c1-opt", *WATER, rng)
    return path, {}
