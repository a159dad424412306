"""Pairwise damped dispersion, with polarizabilities scaled by predicted Hirshfeld ratios.

Each pair of atoms is modeled as a pair of quantum Drude oscillators (vdW-QDO; Khabibrakhmanov,
Fedorov and Tkatchenko, J. Chem. Theory Comput. 19, 7895, 2023), which determines C8 and C10 from C6
and the polarizability, as in SO3LR (Kabylda et al., J. Am. Chem. Soc. 147, 33723, 2025).
"""

from __future__ import annotations

from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree
from ase.units import alpha as FINE_STRUCTURE

from mlip_jax.graphs.graph import long_range_pairs
from mlip_jax.models.layers.basic import Dense, activation, gather, safe_norm
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.terms.layers.free_atoms import C6_COEFFICIENTS, POLARIZABILITIES
from mlip_jax.terms.layers.pairwise import positive, share_among_atoms, switch_off

# _WIDTH: coefficients of the width of the oscillators, a cubic polynomial of the van der Waals
# radius (both in bohr).
_WIDTH = (-0.00433008, 0.24428889, 0.04125273, -0.00078893)
_RADIUS = float(FINE_STRUCTURE ** (-4 / 21))
_DAMPING_RADIUS = 2.54
# _SMALLEST_POLARIZABILITY: lower bound (bohr³), below the value of any atom; the slope of the
# seventh root at zero is infinite.
_SMALLEST_POLARIZABILITY = 1e-6
# _FARTHEST: distance (bohr) beyond which the energy of a pair is negligible; the tenth power of
# much larger distances overflows in float32.
_FARTHEST = 1e3


class Term(nn.Module):
    """Damped C6, C8 and C10 terms over long-range pairs, with Hirshfeld ratios from the features.

    With a cutoff, the energy of each pair is switched off before it. Without a cutoff the sum is
    over all pairs of the list. The term predicts the property "hirshfeld_ratios" (N,), the volume
    of an atom divided by that of the free atom.

    Attributes:
      cutoff: Cutoff radius (Å), or None.
      switch_width: Width of the interval before the cutoff in which the energy goes to zero (Å).
      scale: Factor of the damping radius.
      width: Hidden width of the head of the ratios; None: half of the number of features.
      act: Activation of the head (layers.ACTIVATIONS).
      zero_init: Whether the last kernel of the head starts at zero, so that all ratios are
        initially 1.
    """

    cutoff: float | None = 12.0
    switch_width: float = 2.0
    scale: float = 1.2
    width: int | None = None
    act: str = "silu"
    zero_init: bool = True

    long_range = True

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, features: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the dispersion energy of each atom.

        Atoms of an element without free-atom values get NaN.

        Args:
          graph: Graph with long-range pairs.
          features: Invariant features, shape (N, F).

        Returns:
          Energies (eV), shape (N,), and properties by name.
        """
        if self.cutoff is not None and not self.switch_width > 0:
            raise ValueError(
                "the dispersion term's switch_width must be positive (Å), received "
                f"{self.switch_width}"
            )
        numbers = graph.nodes["numbers"]
        ratios = self._ratios(numbers, features)
        edge = long_range_pairs(graph)
        alpha, c6 = (jnp.asarray(table, ratios.dtype)[numbers] for table in _TABLES)

        def at_pair(values):
            return gather(values, edge.receivers), gather(values, edge.senders)

        (h_i, h_j), (a_i, a_j), (c_i, c_j) = at_pair(ratios), at_pair(alpha), at_pair(c6)
        # 2 C_i C_j A_i A_j / (A_i² C_j + A_j² C_i) with A = a h and C = c h², after canceling h
        c6_pair = 2 * c_i * c_j * a_i * a_j / (a_i * a_i * c_j + a_j * a_j * c_i) * h_i * h_j
        energies = self._pair_energies(
            safe_norm(edge.displacements), 0.5 * (a_i * h_i + a_j * h_j), c6_pair
        )
        return share_among_atoms(energies, edge, len(numbers)), {"hirshfeld_ratios": ratios}

    def _ratios(self, numbers, features):
        """Return the Hirshfeld ratios, shape (N,)."""
        dtype, size = features.dtype, max(features.shape[-1] // 2, 1)
        kernel_init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        shift = self.param("shift", nn.initializers.ones, (MAX_ATOMIC_NUMBER + 1,)).astype(dtype)
        queries = self.param(
            "queries", nn.initializers.normal(1.0), (MAX_ATOMIC_NUMBER + 1, size)
        ).astype(dtype)
        hidden = activation(self.act)(Dense(self.width or size, name="hidden")(features))
        keys = Dense(size, kernel_init=kernel_init, name="final")(hidden)
        return jnp.abs(shift[numbers] + (queries[numbers] * keys).sum(-1) / float(np.sqrt(size)))

    def _pair_energies(self, distances, alpha, c6):
        """Compute the energies of pairs (eV), shape (P,).

        Args:
          distances: Distances (Å), shape (P,).
          alpha: Polarizabilities (bohr³), shape (P,).
          c6: C6 coefficients (hartree bohr⁶), shape (P,).
        """
        r, zero = positive(distances)
        r = jnp.minimum(r / Bohr, _FARTHEST)
        root = jnp.maximum(alpha, _SMALLEST_POLARIZABILITY) ** (1 / 7)
        radius = _RADIUS * root
        b0, b1, b2, b3 = _WIDTH
        squared = (b0 + radius * (b1 + radius * (b2 + radius * b3))) ** 2
        damping = self.scale * 2 * _DAMPING_RADIUS * root
        # C8 = 5 C6 / gamma and C10 = 245 C6 / (8 gamma²) with gamma = 1 / (2 width²)
        coefficients = ((6, 1.0), (8, 10 * squared), (10, 122.5 * squared * squared))
        series = sum(factor / (r**n + damping**n) for n, factor in coefficients)
        energies = -Hartree * c6 * series
        if self.cutoff is not None:
            energies = energies * switch_off(
                distances, self.cutoff - self.switch_width, self.cutoff
            )
        return jnp.where(zero, 0.0, energies)


def _table(values) -> np.ndarray:
    """Return a table by atomic number, shape (119,).

    Padding atoms (number 0) get 1. Elements without a value get NaN, so they cannot go unnoticed.
    """
    table = np.full(MAX_ATOMIC_NUMBER + 1, np.nan)
    table[: len(values) + 1] = [1.0, *values]
    return table


_TABLES = _table(POLARIZABILITIES), _table(C6_COEFFICIENTS)


def check_elements(numbers: Iterable[int]) -> None:
    """Raise ValueError if an element has no free-atom values."""
    last = len(POLARIZABILITIES)
    unknown = sorted({int(z) for z in numbers if z > last})
    if unknown:
        raise ValueError(
            "the dispersion term has no free-atom values for "
            f"{', '.join(chemical_symbols[z] for z in unknown)}, only for elements 1 to {last} "
            f"({chemical_symbols[last]}). Exclude these structures, or remove the term."
        )
