"""What a model gives for each atom, and the head that makes an energy of it."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlip_jax.models.layers.basic import Dense, activation

MAX_ATOMIC_NUMBER = 118


class AtomOutputs(NamedTuple):
    """Per-atom outputs of a model.

    Attributes:
      energies: Atomic energies, shape (N,), in units of the potential's energy scale.
      features: Equivariant features in e3x's layout, shape (N, 1 or 2, (max_degree + 1)**2, F).
      terms: Atomic energies of further terms (mlip_jax/terms) by name, shape (N,) each, in eV.
      properties: Predictions for each atom by name, shape (N,) each: "partial_charges" (e), "hirshfeld_ratios".
    """

    energies: jax.Array
    features: jax.Array
    terms: dict[str, jax.Array] = {}
    properties: dict[str, jax.Array] = {}


class AtomicEnergy(nn.Module):
    """Dense -> activation -> Dense(1), times scale[Z] plus shift[Z].

    Attributes:
      width: Hidden width.
      act: Activation between the two layers.
      zero_init: Last kernel starts at zero, so that an untrained model gives the shifts alone.
      learned_scale, learned_shift: Per-element scale (starts at 1) and shift (starts at 0) are parameters.
    """

    width: int
    act: str = "identity"
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True

    @nn.compact
    def __call__(self, features: jax.Array, numbers: jax.Array) -> jax.Array:
        """(N, F), (N,) -> (N,)."""
        kernel_init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        hidden = activation(self.act)(Dense(self.width, name="hidden")(features))
        energies = Dense(1, kernel_init=kernel_init, name="final")(hidden)[:, 0]
        size = (MAX_ATOMIC_NUMBER + 1,)
        if self.learned_scale:
            energies = energies * self.param("scale", nn.initializers.ones, size)[numbers].astype(energies.dtype)
        if self.learned_shift:
            energies = energies + self.param("shift", nn.initializers.zeros, size)[numbers].astype(energies.dtype)
        return energies


def embed_elements(module: nn.Module, numbers: jax.Array, features: int, dtype) -> jax.Array:
    """One learned vector per element: (N,) -> (N, features)."""
    table = module.param("embedding", nn.initializers.normal(1.0), (MAX_ATOMIC_NUMBER + 1, features))
    return jnp.asarray(table, dtype)[numbers]
