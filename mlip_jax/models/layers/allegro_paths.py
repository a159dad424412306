"""Irreps and paths of Allegro's tensor products.

An irrep is (degree, parity) with parity 1 (even) or -1 (odd). Harmonics have parity (-1)**degree.
"""

from __future__ import annotations

import functools

import e3x
import numpy as np

Irrep = tuple[int, int]


def layer_irreps(max_degree: int, parity: bool, num_layers: int) -> list[list[Irrep]]:
    """Return the irreps of the tensors before the first and after each of the layers.

    They are those which earlier layers reach and which later layers pass on to the invariants of
    the last one.
    """
    natural = harmonic_irreps(max_degree)
    allowed = [(l, p) for l in range(max_degree + 1) for p in (1, -1)] if parity else natural
    irreps = [natural]
    for n in range(num_layers):
        wanted = [(0, 1)] if n == num_layers - 1 else allowed
        irreps.append([out for out in wanted if _paths(irreps[-1], natural, [out])])
    for n in reversed(range(num_layers)):
        irreps[n] = [left for left in irreps[n] if _paths([left], natural, irreps[n + 1])]
    return irreps


def harmonic_irreps(max_degree: int) -> list[Irrep]:
    """Return the irreps of the harmonics."""
    return [(l, (-1) ** l) for l in range(max_degree + 1)]


def _paths(left: list[Irrep], right: list[Irrep], out: list[Irrep]) -> list[tuple[Irrep, Irrep, Irrep]]:
    """Return the allowed couplings, ordered by output, then by left, then by right irrep."""
    return [
        (a, b, o)
        for o in out
        for a in left
        for b in right
        if abs(a[0] - b[0]) <= o[0] <= a[0] + b[0] and a[1] * b[1] == o[1]
    ]


def coupling_tensor(left: list[Irrep], out: list[Irrep], max_degree: int) -> np.ndarray:
    """Return the couplings of tensors with harmonics for each path.

    The paths are ordered by output, then by tensor irrep, then by the degree of the harmonics.

    Args:
      left: Irreps of the tensors.
      out: Irreps of the products.
      max_degree: Largest degree of the harmonics.

    Returns:
      Couplings, shape (paths, components of `left`, (max_degree + 1)**2, components of `out`),
      float64.
    """
    right = harmonic_irreps(max_degree)
    paths = _paths(left, right, out)
    starts = [dict(zip(irreps, np.cumsum([0] + [2 * l + 1 for l, _ in irreps]))) for irreps in (left, right, out)]
    sizes = [sum(2 * l + 1 for l, _ in irreps) for irreps in (left, right, out)]
    tensor = np.zeros((len(paths), *sizes))
    for n, path in enumerate(paths):
        places = tuple(slice(s[i], s[i] + 2 * i[0] + 1) for s, i in zip(starts, path))
        tensor[(n, *places)] = _coupling(*(l for l, _ in path))
    return tensor


@functools.cache
def _coupling(a: int, b: int, c: int) -> np.ndarray:
    """Return e3x's Clebsch-Gordan coefficients of three degrees; their squares sum to 2c + 1."""
    values = np.asarray(e3x.so3.clebsch_gordan(a, b, c), np.float64)
    return values[a * a :, b * b :, c * c :]
