"""Screened nuclear repulsion of Ziegler, Biersack and Littmark (1985) with trainable parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase.units import Bohr, Hartree

from mlip_jax.graphs.graph import pairs
from mlip_jax.models.layers.basic import cutoff_function, gather, safe_norm
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.terms.layers.pairwise import positive, share_among_atoms, switch_off

# universal screening function: sum of c exp(-a d / l) with l = 0.8854 bohr / (Z_i^0.23 + Z_j^0.23)
UNIVERSAL_EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)
UNIVERSAL_COEFFICIENTS = (0.18175, 0.50986, 0.28022, 0.02817)
UNIVERSAL_POWER = 0.23
UNIVERSAL_LENGTH = 0.8854 * Bohr
_LOG_Z = np.log(np.maximum(np.arange(MAX_ATOMIC_NUMBER + 1), 1))


class Term(nn.Module):
    """Repulsion Z_i Z_j / d times a screening function, for distances below `end`.

    The screening function is initially the universal one. Every parameter p is stored as
    softplus⁻¹(p), so it stays positive. Coefficients are divided by their sum.

    Attributes:
      cutoff: Cutoff radius (Å), at most that of the model.
      cutoff_fn: Envelope (layers.CUTOFFS).
      start: Distance at which the repulsion starts to be switched off (Å).
      end: Distance from which the repulsion is zero (Å).
    """

    cutoff: float = 5.0
    cutoff_fn: str = "phys"
    start: float = 0.0
    end: float = 1.5

    long_range = False

    @nn.compact
    def __call__(
        self, graph: jraph.GraphsTuple, features: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the repulsion energy of each atom.

        Args:
          graph: Graph with edges.
          features: Not used.

        Returns:
          Energies (eV), shape (N,), and no properties.
        """
        if not self.start < self.end:
            raise ValueError(
                f"the zbl term's start must be below its end (Å), received start={self.start}, "
                f"end={self.end}"
            )
        numbers, edge = graph.nodes["numbers"], pairs(graph)
        distances, zero = positive(safe_norm(edge.displacements))
        dtype = distances.dtype
        exponents = self._positive("exponents", UNIVERSAL_EXPONENTS, dtype)
        coefficients = self._positive("coefficients", UNIVERSAL_COEFFICIENTS, dtype)
        power = self._positive("power", UNIVERSAL_POWER, dtype)
        inverse_length = self._positive("inverse_length", 1 / UNIVERSAL_LENGTH, dtype)

        # Z^power of each atom, (N,), and the distance d / l, (P,)
        size = jnp.exp(power * jnp.asarray(_LOG_Z, dtype)[numbers])
        reduced = (
            distances * inverse_length * (gather(size, edge.receivers) + gather(size, edge.senders))
        )
        screening = jnp.exp(-exponents * reduced[:, None]) @ (coefficients / coefficients.sum())
        charges = jnp.asarray(numbers, dtype)
        repulsion = (
            Hartree
            * Bohr
            * gather(charges, edge.receivers)
            * gather(charges, edge.senders)
            / distances
        )
        envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff) * switch_off(
            distances, self.start, self.end
        )
        energies = jnp.where(zero, 0.0, repulsion * screening * envelope)
        return share_among_atoms(energies, edge, len(numbers)), {}

    def _positive(self, name, value, dtype):
        """Return a trainable positive parameter with the initial value `value`."""
        stored = np.log(np.expm1(np.asarray(value)))
        return jax.nn.softplus(
            self.param(name, lambda _: jnp.asarray(stored, jnp.float32)).astype(dtype)
        )
