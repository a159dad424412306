"""Coulomb interaction of predicted partial charges, damped at short distances.

It has a cutoff, or is summed over the lattice of crystals (Ewald).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from ase.units import Bohr, Hartree

from mlip_jax.config import unknown_name
from mlip_jax.graphs.graph import long_range_pairs, node_graph_index
from mlip_jax.graphs.long_range import LatticeSum
from mlip_jax.models.layers.basic import Dense, activation, gather, safe_norm, segment_sum
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.terms.layers.ewald import Splitting, is_crystal, pair_potential, reciprocal_energies
from mlip_jax.terms.layers.pairwise import positive, share_among_atoms, switch_off

# _SWITCH_START: fraction of the cutoff from which V - V(cutoff) is gradually replaced by the form
# whose force is zero at the cutoff as well.
_SWITCH_START = 0.45
METHODS = ("cutoff", "ewald")


class Term(nn.Module):
    """Damped Coulomb energy of long-range pairs, with partial charges from the features.

    The energy of a pair is q_i q_j erf(r / damping) / r, times the Coulomb constant. The term
    predicts the property "partial_charges" (N,) in e. The difference to the total charge
    (graph.globals["charge"]) is distributed evenly over the atoms of a structure.

    With the method "cutoff", energy and force of a pair go to zero at the cutoff. Without a cutoff
    the sum is over all pairs of the list. With the method "ewald", the sum is over all pairs of a
    molecule, or over all pairs and images in a crystal. The charge of a crystal is compensated by a
    uniform background. graphs.long_range rejects crystals that need more than `k_vectors`; a cell
    may then grow to twice its lattice vectors, beyond which its energy is NaN.

    Attributes:
      cutoff: Cutoff radius (Å), or None. With "ewald" that of the pair sum in crystals; it changes
        the cost, not the result.
      damping: Damping length (Å). With "ewald" 0 gives point charges.
      width: Hidden width of the head of the charges; None: number of features.
      act: Activation of the head (layers.ACTIVATIONS).
      method: "cutoff" or "ewald".
      accuracy: Largest term that the Ewald sums neglect, relative to the first one.
      k_vectors: Largest number of reciprocal vectors of a cell that is accepted, one of k and -k.
    """

    cutoff: float | None = 12.0
    damping: float = 4.0
    width: int | None = None
    act: str = "silu"
    method: str = "cutoff"
    accuracy: float = 1e-5
    k_vectors: int = 8192

    long_range = True

    @property
    def lattice_sum(self) -> LatticeSum | None:
        """Sum over reciprocal vectors that the term needs in crystals, or None.

        Raises:
          ValueError: An option is invalid.
        """
        if self.method not in METHODS:
            raise ValueError(unknown_name("method of term 'electrostatics'", self.method, METHODS))
        least = "not be negative" if self.method == "ewald" else "be positive"
        if not (self.damping > 0 or (self.damping == 0 and self.method == "ewald")):
            raise ValueError(
                f"the electrostatics term's damping must {least} (Å), received {self.damping}"
            )
        if self.method == "cutoff":
            return None
        if self.cutoff is None:
            raise ValueError(
                "the electrostatics term with method='ewald' needs a finite cutoff for the pair sum "
                "in crystals, received None. Molecules have no cutoff."
            )
        if not (0 < self.accuracy < 0.1 and self.k_vectors >= 1):
            raise ValueError(
                "the electrostatics term's accuracy must be between 0 and 0.1 and its k_vectors "
                f"at least 1, received {self.accuracy} and {self.k_vectors}"
            )
        return LatticeSum(self._splitting.k_max, int(self.k_vectors))

    @property
    def _splitting(self) -> Splitting:
        return Splitting.of(self.cutoff, self.accuracy, self.damping)

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
        lattice_sum = self.lattice_sum
        charges = self._charges(graph, features)
        edge = long_range_pairs(graph)
        distances = safe_norm(edge.displacements)
        if lattice_sum is None:
            shape = self._shape(distances)
        else:
            shape = self._ewald_shape(graph, edge, distances)
        energies = (
            Hartree * Bohr * gather(charges, edge.receivers) * gather(charges, edge.senders) * shape
        )
        energies = share_among_atoms(energies, edge, len(charges))
        if lattice_sum is not None:
            smooth = reciprocal_energies(
                graph, charges, self._splitting, lattice_sum.room, self.damping
            )
            energies = energies + Hartree * Bohr * smooth
        return energies, {"partial_charges": charges}

    def _ewald_shape(self, graph, edge, distances):
        """Compute the pair part of the Ewald sums of unit charges (1/Å): (P,) -> (P,)."""
        r, zero = positive(distances)
        crystal = is_crystal(graph)[node_graph_index(graph)][edge.receivers]
        values = pair_potential(r, crystal, self._splitting, self.cutoff, self.damping)
        return jnp.where(zero, 0.0, values)

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
