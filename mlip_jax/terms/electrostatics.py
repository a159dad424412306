"""Coulomb interaction of predicted partial charges, damped at short distances."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from ase.units import Bohr, Hartree

from mlip_jax.graphs.graph import long_range_pairs, node_graph_index
from mlip_jax.models.layers.basic import Dense, activation, gather, safe_norm, segment_sum
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.terms.layers.pairwise import positive, share_among_atoms, switch_off

# _SWITCH_START: fraction of the cutoff from which V - V(cutoff) is gradually replaced by the form
# whose force is zero at the cutoff as well.
_SWITCH_START = 0.45


class Term(nn.Module):
    """Damped Coulomb energy of long-range pairs, with partial charges from the features.

    The energy of a pair is q_i q_j erf(r / damping) / r, times the Coulomb constant. With a cutoff,
    energy and force of a pair go to zero there. Without a cutoff the sum is over all pairs of the
    list. The term predicts the property "partial_charges" (N,) in e. The difference to the total
    charge (graph.globals["charge"]) is distributed evenly over the atoms of a structure.

    Attributes:
      cutoff: Cutoff radius (Å), or None.
      damping: Damping length (Å).
      width: Hidden width of the head of the charges; None: number of features.
      act: Activation of the head (layers.ACTIVATIONS).
    """

    cutoff: float | None = 12.0
    damping: float = 4.0
    width: int | None = None
    act: str = "silu"

    long_range = True

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, features: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the electrostatic energy of each atom.

        Args:
          graph: Graph with long-range pairs and total charges.
          features: Invariant features, shape (N, F).

        Returns:
          Energies (eV), shape (N,), and properties by name.
        """
        if not self.damping > 0:
            raise ValueError(
                f"the electrostatics term's damping must be positive (Å), received {self.damping}"
            )
        charges = self._charges(graph, features)
        edge = long_range_pairs(graph)
        shape = self._shape(safe_norm(edge.displacements))
        energies = (
            Hartree * Bohr * gather(charges, edge.receivers) * gather(charges, edge.senders) * shape
        )
        return share_among_atoms(energies, edge, len(charges)), {"partial_charges": charges}

    def _charges(self, graph, features):
        """Return the partial charges (e), shape (N,), which add up to the total charges."""
        numbers, node_graph = graph.nodes["numbers"], node_graph_index(graph)
        hidden = activation(self.act)(
            Dense(self.width or features.shape[-1], name="hidden")(features)
        )
        bias = self.param("bias", nn.initializers.zeros, (MAX_ATOMIC_NUMBER + 1,))
        charges = Dense(1, name="final")(hidden)[:, 0] + bias.astype(features.dtype)[numbers]
        total, atoms = (
            jnp.asarray(graph.globals["charge"], charges.dtype),
            jnp.maximum(graph.n_node, 1),
        )
        for _ in range(2):  # the second pass corrects the rounding errors of the first one
            missing = total - segment_sum(charges, node_graph, len(total))
            charges = charges + (missing / atoms)[node_graph]
        return charges

    def _shape(self, distances):
        """Compute the energy of two unit charges over the Coulomb constant (1/Å): (P,) -> (P,)."""
        r, zero = positive(distances)
        # padding pairs have distance zero and get the limit
        potential = jnp.where(
            zero, 2 / (self.damping * math.sqrt(math.pi)), jax.lax.erf(r / self.damping) / r
        )
        if self.cutoff is None:
            return potential
        at_cutoff, slope = damped_coulomb(self.cutoff, self.damping)
        shifted = potential - at_cutoff
        force_shifted = shifted - slope * (distances - self.cutoff)
        s = switch_off(distances, _SWITCH_START * self.cutoff, self.cutoff)
        return jnp.where(distances < self.cutoff, s * shifted + (1 - s) * force_shifted, 0.0)


def damped_coulomb(r: float, damping: float) -> tuple[float, float]:
    """Return erf(r / damping) / r and its derivative with respect to r."""
    x = r / damping
    value = math.erf(x) / r
    return value, 2 / math.sqrt(math.pi) * math.exp(-x * x) / (damping * r) - value / r
