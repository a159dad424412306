"""D3 dispersion correction of density functionals with Becke-Johnson damping, D3(BJ).

Grimme, Antony, Ehrlich and Krieg, J. Chem. Phys. 132, 154104 (2010), and Grimme, Ehrlich and
Goerigk, J. Comput. Chem. 32, 1456 (2011), without the three-body term. The C6 coefficients depend
on the coordination numbers of both atoms.

    N   atoms      P   pairs      R   reference systems of all elements
"""

from __future__ import annotations

from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree

from mlip_jax.graphs.graph import long_range_pairs
from mlip_jax.models.layers.basic import gather, safe_norm, segment_sum
from mlip_jax.terms.layers.d3_functionals import D3Parameters, parameters_of
from mlip_jax.terms.layers.d3_reference import LAST_ELEMENT, MAX_REFERENCES, reference
from mlip_jax.terms.layers.pairwise import positive, share_among_atoms, switch_off

# Steepness of the coordination numbers and of the weights of the reference systems.
_K1, _K3 = 16.0, 4.0
# _FARTHEST: distance (bohr) beyond which the energy of a pair is negligible; powers of much larger
# distances overflow in float32.
_FARTHEST = 1e3


class Term(nn.Module):
    """D3(BJ) dispersion over long-range pairs. It has no trainable parameters.

    Attributes:
      functional: Density functional whose published parameters are used, see
        layers/d3_functionals.py.
      parameters: (s6, s8, a1, a2) instead of published ones, with a2 in bohr; None for these.
      cutoff: Cutoff radius of the energies (Å), 60 bohr; None for all pairs.
      coordination_cutoff: Cutoff radius of the coordination numbers (Å), 40 bohr.
      switch_width: Width of the interval before the cutoff in which the energy goes to zero (Å). If
        it is 0, the energy jumps at the cutoff.
    """

    functional: str = "pbe"
    parameters: tuple[float, float, float, float] | None = None
    cutoff: float | None = 60 * Bohr
    coordination_cutoff: float = 40 * Bohr
    switch_width: float = 2.0

    long_range = True
    own_cutoff = True

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, features: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the dispersion energy of each atom.

        Atoms of an element without reference systems get NaN.

        Args:
          graph: Graph with long-range pairs.
          features: Not used.

        Returns:
          Energies (eV), shape (N,), and no properties.
        """
        s6, s8, a1, a2 = self.checked_parameters()
        numbers, edge = graph.nodes["numbers"], long_range_pairs(graph)
        distances = safe_norm(edge.displacements)
        r, zero = positive(distances)
        within = ~zero if self.cutoff is None else ~zero & (distances < self.cutoff)
        dtype, table = r.dtype, reference()
        known = numbers <= LAST_ELEMENT
        z = jnp.where(known, numbers, 0)
        ratios = jnp.asarray(table.ratios, dtype)[z]
        bohr = jnp.minimum(r / Bohr, _FARTHEST)
        near = ~zero & (distances < self.coordination_cutoff)
        weights = self._weights(z, self._coordination(z, edge, bohr, near))
        c6 = _c6(z, weights, edge)
        ratio = 3 * gather(ratios, edge.receivers) * gather(ratios, edge.senders)  # C8 / C6
        radius = a1 * jnp.sqrt(ratio) + a2
        energies = -Hartree * c6 * (s6 / (bohr**6 + radius**6) + s8 * ratio / (bohr**8 + radius**8))
        if self.cutoff is not None and self.switch_width > 0:
            energies = energies * switch_off(
                distances, self.cutoff - self.switch_width, self.cutoff
            )
        energies = share_among_atoms(jnp.where(within, energies, 0.0), edge, len(numbers))
        return jnp.where(known, energies, jnp.nan), {}

    def checked_parameters(self) -> D3Parameters:
        """Return the parameters.

        Raises:
          ValueError: An option is invalid.
        """
        if not self.switch_width >= 0 or not self.coordination_cutoff > 0:
            raise ValueError(
                "the d3 term's switch_width must not be negative and its coordination_cutoff must "
                f"be positive (Å), received {self.switch_width} and {self.coordination_cutoff}"
            )
        if self.parameters is None:
            return parameters_of(self.functional)
        if len(self.parameters) != 4:
            raise ValueError(
                f"the d3 term's parameters are (s6, s8, a1, a2), received {self.parameters}"
            )
        return D3Parameters(*self.parameters)

    def _coordination(self, z, edge, bohr, near):
        """Return the coordination numbers, (N,)."""
        radii = jnp.asarray(reference().radii, bohr.dtype)[z]
        radius = gather(radii, edge.receivers) + gather(radii, edge.senders)
        bonds = jnp.where(near, jax.nn.sigmoid(_K1 * (4 / 3 * radius / bohr - 1)), 0.0)
        return sum(segment_sum(bonds, i, len(z)) for i in (edge.receivers, edge.senders))

    def _weights(self, z, coordination):
        """Return the weights of the reference systems of each atom, (N, 5)."""
        table = reference()
        difference = coordination[:, None] - jnp.asarray(table.coordination, coordination.dtype)[z]
        logits = jnp.where(jnp.asarray(table.exists)[z], -_K3 * difference**2, -jnp.inf)
        return jax.nn.softmax(logits, axis=-1)


def _c6(z, weights, edge):
    """Return the C6 coefficients of pairs (hartree bohr⁶), (P,)."""
    table = reference()
    systems = jnp.asarray(table.systems)[z]  # (N, 5)
    c6, size = jnp.asarray(table.c6, weights.dtype), len(table.c6)
    # coefficients between an atom with its weights and each reference system, (N, R)
    of_atom = sum(weights[:, k, None] * c6[systems[:, k]] for k in range(MAX_REFERENCES)).ravel()
    row = size * edge.receivers
    return sum(
        gather(of_atom, row + gather(systems[:, k], edge.senders))
        * gather(weights[:, k], edge.senders)
        for k in range(MAX_REFERENCES)
    )


def check_elements(numbers: Iterable[int]) -> None:
    """Raise ValueError if an element has no reference systems."""
    unknown = sorted({int(z) for z in numbers if z > LAST_ELEMENT})
    if unknown:
        raise ValueError(
            "the d3 term has no reference systems for "
            f"{', '.join(chemical_symbols[z] for z in unknown)}, only for elements 1 to "
            f"{LAST_ELEMENT} ({chemical_symbols[LAST_ELEMENT]}). Exclude these structures, or "
            "remove the term."
        )
