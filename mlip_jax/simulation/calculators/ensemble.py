"""ASE calculator of several force fields: mean and standard deviation of their predictions.

The standard deviation over the members indicates how far the mean can be trusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.importers import load_force_field
from mlip_jax.potential import Evaluation, Potential, evaluate, hessian_columns
from mlip_jax.simulation.calculators.padded import PaddedCalculator
from mlip_jax.simulation.trust.coverage import unseen_states
from mlip_jax.simulation.trust.ensemble_calibration import Calibration


class _ArchitectureGroup(NamedTuple):
    """Members of one architecture.

    Attributes:
      model: Model shared by the members.
      indices: Indices of the members in the ensemble.
    """

    model: nn.Module
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _GroupedForceFields:
    """`PureForceField` of the members of an ensemble.

    Attributes:
      groups: Members by architecture.
      predicted: Names of the per-atom predictions that all members share.
    """

    groups: tuple[_ArchitectureGroup, ...]
    predicted: tuple[str, ...]

    def evaluate(self, params, graph, with_stress):
        def one(model, group_params, scale):
            out = evaluate(model, group_params, graph, scale, with_stress)
            # only predictions that all members share can be concatenated
            return out._replace(properties={name: out.properties[name] for name in self.predicted})

        per_group: list[Evaluation] = self._over_members(one, params)
        # from the order of the groups to the order of the members
        back = np.argsort([member for group in self.groups for member in group.indices])
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back], *per_group)

    def hessian_columns(self, params, graph, directions):
        def one(model, group_params, scale):
            return hessian_columns(model, group_params, graph, scale, directions)

        num_members = sum(len(group.indices) for group in self.groups)
        return sum(columns.sum(axis=0) for columns in self._over_members(one, params)) / num_members

    def _over_members(self, function, params) -> list[Any]:
        """Evaluate function(model, params, energy_scale) for all members of each group.

        Returns:
          One result per group. Axis 0 of each leaf indexes the members of the group.
        """
        return [
            jax.vmap(lambda p, scale, model=group.model: function(model, p, scale))(*group_params)
            for group, group_params in zip(self.groups, params)
        ]


class EnsembleCalculator(PaddedCalculator):
    """Calculator for ASE that returns mean and spread over an ensemble of force fields.

    The members differ in seed, training data or architecture. Properties and units are those of
    `MLIPCalculator`; each property is the mean over the members, and so are the Hessian and all
    quantities derived from it. If all members predict partial charges, charges and dipole are
    available.

    For each property except free_energy, `results` also contains the sample standard deviation
    (divisor n-1) over the members, per component, with the same unit and shape:

        energy_std     ()             eV
        energies_std   (n_atoms,)     eV
        forces_std     (n_atoms, 3)   eV/Å
        stress_std     (6,)           eV/Å³
        charges_std    (n_atoms,)     e
        dipole_std     (3,)           e·Å

    Read them with `calc.results["forces_std"]` or `calc.get_property("forces_std", atoms)`.

    A standard deviation over members is not the expected error, but it grows with the error. With a
    calibration (written by configs/ensemble.py) `results` also contains energy_expected_error (eV)
    and forces_expected_error (n_atoms,) in eV/Å, the latter per component of the force on an atom.
    Both are standard deviations of the error of the mean, estimated on held-out structures. They are
    NaN for a charge, a number of unpaired electrons or periodicity that a member was not trained on.

    All members are evaluated in one program, which is compiled once per size. Members of one
    architecture are batched. Only elements known to all members are supported.

    Attributes:
      potentials: The members, with their parameters on the host.
      groups: Members by architecture.
      calibration: Calibration of the members, or None.
      conservative: Whether the forces of all members are minus the gradient of their energies.
      dtype, num_compiles, implemented_properties, predictions: As for `MLIPCalculator`; predictions
        are means.
    """

    def __init__(
        self,
        potentials: Iterable[Potential],
        dtype: str = "float32",
        calibration: Calibration | None = None,
    ):
        """Create an ensemble.

        Args:
          potentials: Two or more force fields with the same cutoff and the same long-range cutoff.
          dtype: "float32" or "float64".
          calibration: Calibration of these members.

        Raises:
          ValueError: If there are fewer than two members, their cutoffs differ, dtype is neither of
            the two, or the calibration is of other members.
        """
        potentials = tuple(potentials)
        if len(potentials) < 2:
            raise ValueError(
                f"an ensemble needs at least two force fields, received {len(potentials)}. Use "
                "MLIPCalculator for one."
            )
        cutoffs = [(p.cutoff, p.long_range_cutoff) for p in potentials]
        if len(set(cutoffs)) > 1:
            raise ValueError(
                "the members of an ensemble share one neighbor list and must have the same "
                "cutoff and long-range cutoff; received (in Å) "
                f"{', '.join(map(str, cutoffs))}"
            )
        if calibration is not None:
            calibration.check(potentials)
        super().__init__(potentials, dtype)
        self.calibration = calibration
        self.potentials = self._members
        self.groups = _group_by_architecture(self.potentials)
        with_deviation = [name for name in self.implemented_properties if name != "free_energy"]
        self.implemented_properties = [
            *self.implemented_properties,
            *(f"{name}_std" for name in with_deviation),
            *(calibration.properties() if calibration is not None else ()),
        ]

    @classmethod
    def from_workdirs(
        cls,
        paths: Sequence[str | Path],
        dtype: str = "float32",
        calibration: str | Path | None = None,
    ) -> EnsembleCalculator:
        """Create an ensemble from the locations of several force fields.

        Args:
          paths: Force fields, each in any form that `importers.load_force_field` accepts.
          dtype: "float32" or "float64".
          calibration: ensemble.json of these members, or the folder that contains it.

        Raises:
          CheckpointError: If one of the directories contains no readable force field.
          FileNotFoundError: If the calibration does not exist.
          ValueError: As for `__init__`; or if `paths` is one path instead of a list.
        """
        if isinstance(paths, str | Path):
            raise ValueError(f"expected a list of workdirs, received one path, {str(paths)!r}")
        known = None if calibration is None else Calibration.load(calibration)
        return cls([load_force_field(path) for path in paths], dtype, known)

    def _params(self):
        """Return parameters and energy scales (M,) of each group, stacked along a leading axis."""
        stacked = []
        for group in self.groups:
            members = [self.potentials[member_index] for member_index in group.indices]
            scales = np.array([m.energy_scale for m in members], self.dtype)
            stacked.append(
                (
                    jax.tree.map(lambda *leaves: np.stack(leaves), *(m.params for m in members)),
                    scales,
                )
            )
        return stacked

    def _force_field(self):
        return _GroupedForceFields(self.groups, self._predicted)

    def _results(self, atoms, positions, out, stress):
        stresses = [None] * len(out) if stress is None else stress
        per_member, predictions = zip(
            *(
                self._results_of(p, atoms, positions, o, s)
                for p, o, s in zip(self.potentials, out, stresses)
            )
        )
        self.predictions = {
            name: np.mean([p[name] for p in predictions], axis=0) for name in self._predicted
        }
        results = {}
        for name in per_member[0]:
            values = np.array([member_results[name] for member_results in per_member])
            results[name] = _plain(values.mean(axis=0))
            if name != "free_energy":
                results[f"{name}_std"] = _plain(values.std(axis=0, ddof=1))
        if self.calibration is not None:
            expected = self.calibration.results(results["energy_std"], results["forces_std"])
            if unseen_states(atoms, self.potentials):  # nothing calibrates them
                expected = {
                    name: _plain(np.full(np.shape(v), np.nan)) for name, v in expected.items()
                }
            results |= expected
        return results


def _group_by_architecture(potentials: Sequence[Potential]) -> tuple[_ArchitectureGroup, ...]:
    """Group members that have equal models and equal parameter shapes."""
    groups: list[tuple[Any, list[int]]] = []
    for index, potential in enumerate(potentials):
        kind = potential.model, jax.tree.map(np.shape, potential.params)
        for other, indices in groups:
            if other == kind:
                indices.append(index)
                break
        else:
            groups.append((kind, [index]))
    return tuple(_ArchitectureGroup(kind[0], tuple(indices)) for kind, indices in groups)


def _plain(value):
    """Return a scalar as a Python float, and an array unchanged."""
    return float(value) if np.ndim(value) == 0 else value
