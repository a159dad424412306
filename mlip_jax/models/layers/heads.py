"""Per-atom outputs of models, and the energy head."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax

from mlip_jax.graphs.element_rows import element_rows
from mlip_jax.models.layers.basic import Dense, activation

MAX_ATOMIC_NUMBER = 118


class AtomOutputs(NamedTuple):
    """Per-atom outputs of a model.

    Attributes:
      energies: Atomic energies in units of the potential's energy scale, shape (N,).
      features: Equivariant features in e3x's layout, shape (N, 1 or 2, (max_degree + 1)**2, F).
      terms: Atomic energies (eV) of further terms (mlip_jax/terms) by name, shape (N,) each.
      properties: Per-atom predictions by name, shape (N,) each: "partial_charges" (e),
        "hirshfeld_ratios".
      forces: Predicted forces in units of the energy scale per Å, shape (N, 3), of a model with
        `direct_forces`. They turn with the structure. None: forces are minus the gradient of the
        energy.
    """

    energies: jax.Array
    features: jax.Array
    terms: dict[str, jax.Array] = {}
    properties: dict[str, jax.Array] = {}
    forces: jax.Array | None = None


class BondOutputs(NamedTuple):
    """Outputs of a model of bonds (mlip_jax/models/bond_graphs).

    Attributes:
      features: Features of the heavy atoms in e3x's layout, shape (N, 1, 1, F).
      positions: Refined positions of the heavy atoms (Å), shape (N, 3), of a model that refines
        them; None otherwise.
    """

    features: jax.Array
    positions: jax.Array | None = None


class AtomicEnergy(nn.Module):
    """Energy head: Dense -> activation -> Dense(1), times scale[Z] plus shift[Z].

    Attributes:
      width: Width of the hidden layer.
      act: Activation between the two layers.
      zero_init: Whether the last kernel starts at zero, so that an untrained model predicts only
        the shifts.
      learned_scale: Whether there is a trainable scale per element, initially 1.
      learned_shift: Whether there is a trainable shift per element, initially 0.
    """

    width: int
    act: str = "identity"
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True

    @nn.compact
    def __call__(self, features: jax.Array, numbers: jax.Array) -> jax.Array:
        """Compute atomic energies: features (N, F), numbers (N,) -> (N,)."""
        kernel_init = nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        hidden = activation(self.act)(Dense(self.width, name="hidden")(features))
        energies = Dense(1, kernel_init=kernel_init, name="final")(hidden)[:, 0]
        return scale_and_shift(self, energies, numbers, self.learned_scale, self.learned_shift)


def scale_and_shift(
    module: nn.Module,
    energies: jax.Array,
    numbers: jax.Array,
    learned_scale: bool,
    learned_shift: bool,
) -> jax.Array:
    """Multiply atomic energies by a scale per element, and add a shift per element.

    The tables are the parameters "scale", initially 1, and "shift", initially 0, of `module`.

    Args:
      module: Module that owns the parameters.
      energies: Atomic energies, shape (N,).
      numbers: Atomic numbers, shape (N,).
      learned_scale: Whether there is a scale.
      learned_shift: Whether there is a shift.
    """
    size = (MAX_ATOMIC_NUMBER + 1,)
    if learned_scale:
        scale = module.param("scale", nn.initializers.ones, size)
        energies = energies * element_rows(scale, numbers, energies.dtype)
    if learned_shift:
        shift = module.param("shift", nn.initializers.zeros, size)
        energies = energies + element_rows(shift, numbers, energies.dtype)
    return energies


def embed_elements(module: nn.Module, numbers: jax.Array, features: int, dtype) -> jax.Array:
    """Return a trainable vector per element for each atom: (N,) -> (N, features).

    The table is the parameter "embedding" of `module`.
    """
    table = module.param(
        "embedding", nn.initializers.normal(1.0), (MAX_ATOMIC_NUMBER + 1, features)
    )
    return element_rows(table, numbers, dtype)
