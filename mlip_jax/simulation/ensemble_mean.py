"""Mean of several force fields as one force field, for relaxation, dynamics and vibrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.models.layers.forces import has_direct_forces, is_conservative
from mlip_jax.models.layers.heads import AtomOutputs
from mlip_jax.potential import Potential


@dataclasses.dataclass(frozen=True)
class EnsembleMean:
    """Model whose atomic energies (eV) are the means over its members.

    Its parameters are a tuple of those of the members, and its energy scale is 1.

    Attributes:
      members: Models of the members.
      scales: Energies per unit of the members' outputs (eV).
      cutoff: Cutoff radius (Å).
      long_range_cutoff: Cutoff of long-range pairs (Å); None if no member needs any.
    """

    members: tuple[nn.Module, ...]
    scales: tuple[float, ...]
    cutoff: float
    long_range_cutoff: float | None

    @property
    def conservative(self) -> bool:
        """Whether the forces of all members are minus the gradient of their energies."""
        return all(is_conservative(model) for model in self.members)

    def apply(self, params: Sequence[Any], graph: jraph.GraphsTuple) -> AtomOutputs:
        """Return the outputs of a padded batch; features are those of degree 0 of all members."""
        outputs = [model.apply(p, graph) for model, p in zip(self.members, params)]
        energies = [
            sum(out.terms.values(), out.energies * scale)
            for out, scale in zip(outputs, self.scales)
        ]
        features = jnp.concatenate([out.features[:, :1, :1] for out in outputs], axis=-1)
        common = set.intersection(*(set(out.properties) for out in outputs))
        properties = {name: _mean([out.properties[name] for out in outputs]) for name in common}
        return AtomOutputs(_mean(energies), features, {}, properties)


def mean_potential(members: Sequence[Potential]) -> Potential:
    """Return the force field whose energies and forces are the means over its members.

    Raises:
      ValueError: The members differ in a cutoff or predict forces directly.
    """
    cutoffs = {(p.cutoff, p.long_range_cutoff) for p in members}
    if len(cutoffs) > 1:
        raise ValueError(
            "the members of an ensemble share one neighbor list and must have the same cutoff and "
            f"long-range cutoff; received (in Å) {', '.join(map(str, sorted(cutoffs, key=str)))}"
        )
    if any(has_direct_forces(p.model) for p in members):
        raise ValueError(
            "force fields that predict forces directly cannot be combined to an ensemble here; "
            "use one of them, or EnsembleCalculator"
        )
    ((cutoff, long_range_cutoff),) = cutoffs
    elements = set.intersection(*(set(p.elements) for p in members))
    return Potential(
        model=EnsembleMean(
            tuple(p.model for p in members),
            tuple(float(p.energy_scale) for p in members),
            cutoff,
            long_range_cutoff,
        ),
        params=tuple(p.params for p in members),
        cutoff=cutoff,
        reference_energies=np.mean([p.reference_energies for p in members], axis=0),
        energy_scale=1.0,
        elements=tuple(sorted(elements)),
        metadata={"members": [p.metadata for p in members]},
    )


def members_of(potential: Potential) -> tuple[Potential, ...]:
    """Return the members of a result of `mean_potential`, and any other force field itself.

    Their reference energies are those of the mean.
    """
    if not isinstance(potential.model, EnsembleMean):
        return (potential,)
    mean = potential.model
    return tuple(
        dataclasses.replace(
            potential, model=model, params=params, energy_scale=scale, metadata=metadata
        )
        for model, params, scale, metadata in zip(
            mean.members, potential.params, mean.scales, potential.metadata["members"]
        )
    )


def level_of_theory(potential: Potential) -> str:
    """Return the level of theory of the training labels, "unknown" if it was not recorded.

    The levels of an ensemble are joined if its members differ.
    """
    metadata = potential.metadata.get("members", [potential.metadata])
    levels = {m.get("statistics", {}).get("level_of_theory", "unknown") for m in metadata}
    return " / ".join(sorted(levels))


def _mean(values: Sequence[jax.Array]) -> jax.Array:
    return sum(values) / len(values)
