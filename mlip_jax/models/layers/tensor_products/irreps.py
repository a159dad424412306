"""Irreducible representations of O(3), and products of them.

An `Irrep` is a degree with a parity. Equivariant features are a dict from irreps to arrays:

    {Irrep(0, 1): (N, 1, 32), Irrep(1, -1): (N, 3, 16)}     "32x0e+16x1o"

with components before channels. The components follow e3x: (x, y, z) for degree 1, and the orders
m = l, -l, l-1, ..., 0 about the z axis for higher degrees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

EVEN, ODD = 1, -1


class Irrep(NamedTuple):
    """Irreducible representation of O(3).

    Irreps are ordered by degree, then odd before even.

    Attributes:
      degree: Degree l; there are 2l + 1 components.
      parity: 1 for even, -1 for odd.
    """

    degree: int
    parity: int

    def __str__(self) -> str:
        return f"{self.degree}{'e' if self.parity == EVEN else 'o'}"

    @property
    def size(self) -> int:
        """Number of components."""
        return 2 * self.degree + 1


SCALAR = Irrep(0, EVEN)
Irreps = tuple[tuple[int, Irrep], ...]  # (number of channels, irrep) of each block
Features = Mapping[Irrep, jax.Array]  # (N, 2l + 1, channels) each


def parse(text: str) -> Irreps:
    """Convert a text such as "32x0e+16x1o" to ((32, 0e), (16, 1o)).

    Raises:
      ValueError: The text is not of this form.
    """
    blocks = []
    for block in text.split("+"):
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)([eo])", block.strip())
        if not match:
            raise ValueError(f"irreps must have the form '32x0e+16x1o', received {text!r}")
        channels, degree, parity = match.groups()
        blocks.append((int(channels or 1), Irrep(int(degree), EVEN if parity == "e" else ODD)))
    return tuple(blocks)


def to_text(irreps: Irreps) -> str:
    """Convert irreps to text, the inverse of `parse`."""
    return "+".join(f"{channels}x{irrep}" for channels, irrep in irreps)


def product(a: Irrep, b: Irrep) -> list[Irrep]:
    """Return the irreps in the product of two irreps, by ascending degree."""
    return [Irrep(l, a.parity * b.parity) for l in range(abs(a.degree - b.degree), a.degree + b.degree + 1)]


def reachable(a: Iterable[Irrep], b: Iterable[Irrep]) -> set[Irrep]:
    """Return the irreps in all products of one irrep of `a` and one of `b`."""
    b = list(b)
    return {irrep for x in a for y in b for irrep in product(x, y)}


def natural(max_degree: int) -> list[Irrep]:
    """Return the irreps of the spherical harmonics, with parity (-1)^l."""
    return [Irrep(l, (-1) ** l) for l in range(max_degree + 1)]


def merge(irreps: Iterable[tuple[int, Irrep]]) -> Irreps:
    """Merge the blocks of each irrep, in the order in which irreps first appear."""
    channels: dict[Irrep, int] = {}
    for count, irrep in irreps:
        channels[irrep] = channels.get(irrep, 0) + count
    return tuple((count, irrep) for irrep, count in channels.items())


def irreps_of(features: Features) -> Irreps:
    """Return the irreps of features."""
    return tuple((values.shape[-1], irrep) for irrep, values in features.items())
