"""Origin of the forces of a model: the gradient of its energy, or predictions.

Wrappers of models, such as terms.WithTerms, forward the properties that these functions read.
"""

from __future__ import annotations

import flax.linen as nn

from mlip_jax.models.layers.heads import AtomOutputs


def has_direct_forces(model: nn.Module) -> bool:
    """Return whether a model predicts forces (`AtomOutputs.forces`) in addition to energies."""
    return getattr(model, "direct_forces", False)


def is_conservative(model: nn.Module) -> bool:
    """Return whether the forces of a model are minus the gradient of its energy.

    Direct forces are not. A model may declare others with the property `conservative`.
    """
    return getattr(model, "conservative", not has_direct_forces(model))


def has_energy_derivatives(model: nn.Module) -> bool:
    """Return whether derivatives of the energy (stress, Hessian) are available.

    They are unless the model differentiates its energy only in part (so it is not conservative)
    and has no direct forces.
    """
    return is_conservative(model) or has_direct_forces(model)


# Message of functions that require derivatives of the energy.
NO_ENERGY_DERIVATIVES = (
    "this model has no {what}: its forces are only a part of the gradient of its energy (the "
    "property `conservative` of its class is False)"
)


def check_forces(model: nn.Module, outputs: AtomOutputs) -> None:
    """Raise ValueError unless a model returns forces if, and only if, it has direct forces."""
    direct = has_direct_forces(model)
    if direct != (outputs.forces is not None):
        raise ValueError(
            f"{type(model).__module__}: direct_forces is {direct}, but the model returns "
            f"{'no ' if direct else ''}forces; a model returns forces if and only if it is set"
        )
