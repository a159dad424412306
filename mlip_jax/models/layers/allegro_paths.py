"""Irreps and couplings of Allegro's tensor products with spherical harmonics."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlip_jax.models.layers.tensor_products.couplings import coupling
from mlip_jax.models.layers.tensor_products.irreps import EVEN, ODD, SCALAR, Irrep, natural, product


def layer_irreps(max_degree: int, parity: str, num_layers: int) -> list[list[Irrep]]:
    """Return the irreps of the tensors before the first and after each of the layers.

    They are those that earlier layers reach and that later layers pass on to the scalars of the
    last one.

    Args:
      max_degree: Largest degree of harmonics and tensors.
      parity: "full" for both parities of each degree, "natural" for those of the harmonics.
      num_layers: Number of tensor products.
    """
    harmonics = natural(max_degree)
    full = [Irrep(l, p) for l in range(max_degree + 1) for p in (EVEN, ODD)]
    allowed = full if parity == "full" else harmonics
    irreps = [harmonics]
    for n in range(num_layers):
        wanted = [SCALAR] if n == num_layers - 1 else allowed
        irreps.append([out for out in wanted if _paths(irreps[-1], harmonics, [out])])
    for n in reversed(range(num_layers)):
        irreps[n] = [left for left in irreps[n] if _paths([left], harmonics, irreps[n + 1])]
    return irreps


def _paths(left: Iterable[Irrep], right: Iterable[Irrep], out: Iterable[Irrep]):
    """Return the couplings to `out`, ordered by output, then by left, then by right irrep."""
    return [(a, b, c) for c in out for a in left for b in right if c in product(a, b)]


def product_tensor(left: list[Irrep], out: list[Irrep], max_degree: int) -> np.ndarray:
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
    right = natural(max_degree)
    paths, blocks = _paths(left, right, out), [_blocks(irreps) for irreps in (left, right, out)]
    tensor = np.zeros((len(paths), *(sum(i.size for i in irreps) for irreps in (left, right, out))))
    for n, path in enumerate(paths):
        tensor[(n, *(block[i] for block, i in zip(blocks, path)))] = coupling(
            *(i.degree for i in path)
        )
    return tensor


def _blocks(irreps: list[Irrep]) -> dict[Irrep, slice]:
    """Return the components of each irrep if they follow each other."""
    stops = np.cumsum([irrep.size for irrep in irreps]).tolist()
    return {irrep: slice(stop - irrep.size, stop) for irrep, stop in zip(irreps, stops)}
