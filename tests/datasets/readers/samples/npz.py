"""Two waters and a hydrogen molecule, padded with zeros, with invented labels in eV and Å."""

from pathlib import Path

import numpy as np

ARRAYS = {
    "atomic_numbers": np.array([[8, 1, 1], [8, 1, 1], [1, 1, 0]]),
    "positions": np.array(
        [
            [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]],
            [[0, 0, 0.129], [0, 0.783, -0.477], [0, -0.783, -0.477]],
            [[0, 0, 0.0], [0, 0, 0.74], [0, 0, 0]],
        ]
    ),
    "energy": np.array([-2078.25, -2078.5, -31.75]),
    "forces": np.arange(27.0).reshape(3, 3, 3),
}


def make(folder: Path):
    path = folder / "mine.npz"
    np.savez(path, **ARRAYS)
    return path, {}
