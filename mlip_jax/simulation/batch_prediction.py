"""Predictions of one or several force fields for many structures, in batches on all devices.

`BatchPredictor` evaluates the members of an ensemble on one batch after another: the host builds
batches while the devices compute. Results are those of the calculators:

- energies, forces, partial charges if the force fields predict them, and the stress of structures
  that are periodic in three directions unless a member has no derivatives of its energy: means over
  the members;
- of several members: standard deviations and, with a calibration, expected errors;
- with a domain: distances of the atoms from the training atoms, and expected force errors. The
  distances of an ensemble are the largest over the members whose domain is known.

Expected errors are NaN for structures with a charge, spin or periodicity without training data.

S is the number of structures and A the number of their atoms.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.packing import plan_batches
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.graphs.shapes import GrowingBudget
from mlip_jax.importers import split_force_fields
from mlip_jax.potential import Potential, evaluate, has_energy_derivatives
from mlip_jax.simulation.device_memory import ProgramTooLarge, check_fits, largest_size
from mlip_jax.simulation.energies import invariant_features
from mlip_jax.simulation.ensemble_mean import level_of_theory
from mlip_jax.simulation.force_fields import load_each
from mlip_jax.simulation.structure_predictions import StructurePredictions
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.coverage import has_unseen_state
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.simulation.trust.ensemble_calibration import Calibration

log = logging.getLogger(__name__)

# Average number of atoms of a batch by platform: it fits the caches of a core or fills a GPU. A
# batch is smaller if its program does not fit into the memory, see `device_memory`.
_BATCH_ATOMS = {"cpu": 640, "gpu": 16_384, "tpu": 16_384}


@dataclasses.dataclass(frozen=True)
class ForceFieldMember:
    """Force field with its domain.

    Attributes:
      name: Workdir or file of the force field, or its digest if it has neither.
      potential: Force field.
      domain: Domain of the force field, or None.
    """

    name: str
    potential: Potential
    domain: Domain | None

    @property
    def level_of_theory(self) -> str:
        """Level of theory of the training labels."""
        return level_of_theory(self.potential)


def load_members(given: Any) -> tuple[ForceFieldMember, ...]:
    """Load force fields with their domains.

    Args:
      given: One or several force fields, see `importers.split_force_fields`.

    Raises:
      CheckpointError, ValueError, FileNotFoundError: As for `importers.load_force_field`, or a
        force field occurs twice.
    """
    items = split_force_fields(given)
    potentials = load_each(items)
    digests = [p.digest() for p in potentials]
    if len(set(digests)) < len(digests):
        raise ValueError(
            "members of an ensemble must differ, but a force field occurs twice among "
            + ", ".join(str(item) if isinstance(item, str) else "objects" for item in items)
        )
    return tuple(
        ForceFieldMember(item if isinstance(item, str) else digest, potential, atom_domain.of(item))
        for item, potential, digest in zip(items, potentials, digests)
    )


class BatchPredictor:
    """Evaluates force fields on structures. Its programs are compiled once per batch shape."""

    def __init__(
        self,
        members: Sequence[ForceFieldMember],
        *,
        dtype: str = "float32",
        batch_atoms: int | None = None,
        calibration: Calibration | None = None,
    ):
        """Create a predictor.

        Args:
          members: Force fields; several are an ensemble.
          dtype: "float32" or "float64".
          batch_atoms: Average number of atoms per batch; None or 0 chooses by the kind of device.
            Batches are smaller if the compiled program needs more memory than the device has.
          calibration: Calibration of the ensemble.

        Raises:
          ValueError: The calibration is of other members.
        """
        if calibration is not None:
            calibration.check([m.potential for m in members])
        self.members = tuple(members)
        self._calibration, self._dtype = calibration, np.dtype(dtype)
        self._devices = jax.local_devices()
        self._batch_atoms = batch_atoms or _BATCH_ATOMS.get(
            self._devices[0].platform, _BATCH_ATOMS["gpu"]
        )
        self._checked: set[tuple] = set()  # programs whose memory has been compared
        # Members with the same cutoffs share their batches.
        cutoffs = [(m.potential.cutoff, m.potential.long_range_cutoff) for m in members]
        self._groups = {
            key: (GrowingBudget(), [k for k, c in enumerate(cutoffs) if c == key])
            for key in dict.fromkeys(cutoffs)
        }
        with jax.enable_x64(self._dtype == np.float64):
            self._params = [
                [jax.device_put(_cast(m.potential.params, self._dtype), d) for d in self._devices]
                for m in members
            ]

    @property
    def elements(self) -> frozenset[int]:
        """Elements that all members were trained on."""
        return frozenset.intersection(*(frozenset(m.potential.elements) for m in self.members))

    def predict(
        self, columns: Columns, on_batch: Callable[[int], None] = lambda count: None
    ) -> StructurePredictions:
        """Predict the properties of structures.

        Args:
          columns: Structures with known elements.
          on_batch: Function that is called with the number of structures finished since its last
            call.
        """
        periodic = _fully_periodic(columns)  # (S,)
        if not all(has_energy_derivatives(m.potential.model) for m in self.members):
            periodic[:] = False  # no stress
        arrays = [MemberArrays(m, columns, periodic.any()) for m in self.members]
        with jax.enable_x64(self._dtype == np.float64):
            for (cutoff, long_range), (growing, group) in self._groups.items():
                last = group[-1] == len(self.members) - 1
                self._predict_group(
                    columns, cutoff, long_range, growing, group, arrays, on_batch if last else None
                )
        return self.combine(columns, periodic, arrays)

    def _predict_group(self, columns, cutoff, long_range, growing, group, arrays, on_batch):
        """Fill the arrays of members that share their batches."""
        if not len(columns):
            return
        columns = _centered(columns)
        sizes = graph_sizes(columns, cutoff, long_range)
        budget = self.fitting_budget(columns, sizes, cutoff, long_range, growing, group, arrays)
        pending: collections.deque = collections.deque()

        def collect():
            places, k, outputs = pending.popleft()
            arrays[k].fill(places, jax.device_get(outputs))
            if on_batch is not None and k == group[-1]:
                on_batch(len(places))

        for number, places in enumerate(plan_batches(np.arange(len(columns)), sizes, budget)):
            graph = build_batch(
                columns.take(places),
                budget,
                cutoff,
                dtype=self._dtype,
                long_range_cutoff=long_range,
            )
            place = number % len(self._devices)
            for k in group:
                # Calls return before the device has finished, so the next batch is built meanwhile.
                outputs = evaluate_batch(*self._options(k, arrays), self._params[k][place], graph)
                pending.append((places, k, outputs))
            while len(pending) > 2 * len(self._devices) * len(group):
                collect()
        while pending:
            collect()

    def _options(self, k: int, arrays) -> tuple:
        """Return the static arguments of the program of a member."""
        potential = self.members[k].potential
        return (
            potential.model,
            potential.energy_scale,
            arrays[k].stress is not None,
            arrays[k].distance is not None,
        )

    def fitting_budget(self, columns, sizes, cutoff, long_range, growing, group, arrays):
        """Return a budget whose programs fit into the memory of the device.

        Later calls have smaller batches, too. A batch of one structure is tried in any case.
        """
        average, too_large = float(sizes.n_node.mean()), []
        while True:
            count = min(max(self._batch_atoms / average, 1), len(columns))
            budget = growing.fit(choose_budget(sizes, count))
            new = [k for k in group if (budget, self._options(k, arrays)) not in self._checked]
            if not new or count <= 1:
                return budget
            first = next(iter(plan_batches(np.arange(len(columns)), sizes, budget)))
            options = {"dtype": self._dtype, "long_range_cutoff": long_range}
            graph = build_batch(columns.take(first), budget, cutoff, **options)
            try:
                for k in new:
                    args = *self._options(k, arrays), self._params[k][0], graph
                    check_fits(evaluate_batch, *args, device=self._devices[0])
                    self._checked.add((budget, self._options(k, arrays)))
                return budget
            except ProgramTooLarge as error:
                too_large.append((count * average, error.needed))
                self._batch_atoms = largest_size(too_large, error.available)
                growing.clear()
                log.warning("%s; continuing with batches of %d atoms", error, self._batch_atoms)

    def combine(
        self, columns: Columns, periodic: np.ndarray, arrays: Sequence[MemberArrays]
    ) -> StructurePredictions:
        """Return means, deviations and expected errors over the members.

        Args:
          columns: Structures.
          periodic: Whether structures have a stress, (S,) bool.
          arrays: Predictions of each member.
        """
        energies, forces = (np.array([getattr(a, n) for a in arrays]) for n in ("energy", "forces"))
        result: dict[str, Any] = {"energy": energies.mean(0), "forces": forces.mean(0)}
        if periodic.any():
            result["stress"] = np.mean([a.stress for a in arrays], axis=0)
            result["stress"][~periodic] = np.nan
        unseen = has_unseen_state(columns, [m.potential for m in self.members])  # (S,)
        result["unseen"] = unseen
        if distances := [a.relative_distance() for a in arrays if a.distance is not None]:
            result["domain_distance"] = np.max(distances, axis=0)
        if all(a.has_expected_errors for a in arrays):
            result["forces_expected_error"] = np.mean([a.expected_errors() for a in arrays], axis=0)
        if all(a.charges is not None for a in arrays) and len(columns):
            result["charges"] = np.mean([a.charges for a in arrays], axis=0)
        if len(arrays) > 1:
            result |= {"energy_std": energies.std(0, ddof=1), "forces_std": forces.std(0, ddof=1)}
        if self._calibration is not None:
            result |= self._calibration.expected(
                columns.n_atoms, result["energy_std"], result["forces_std"]
            )
        for name, rows in (
            ("energy_expected_error", unseen),
            ("forces_expected_error", np.repeat(unseen, columns.n_atoms)),
        ):
            if name in result:
                result[name] = np.where(rows, np.nan, result[name])
        return StructurePredictions(np.asarray(columns.n_atoms, np.int64), **result)


class MemberArrays:
    """Predictions of one member, which are filled batch by batch, in float64."""

    def __init__(self, member: ForceFieldMember, columns: Columns, with_stress: bool):
        atoms = len(columns.numbers)
        self._columns, self._domain = columns, member.domain
        self._reference = sum_reference(member.potential.reference_energies, columns)
        self.energy, self.forces = np.empty(len(columns)), np.empty((atoms, 3))
        self.stress = np.empty((len(columns), 3, 3)) if with_stress else None
        self.distance = None if member.domain is None else np.empty(atoms)
        self.charges: np.ndarray | None = None

    def fill(self, places: np.ndarray, outputs) -> None:
        """Store the outputs of a padded batch of the structures `places`."""
        rows = self._columns.atoms_of(places)
        energy, forces, stress, charges, features = outputs
        self.energy[places] = energy[: len(places)].astype(np.float64) + self._reference[places]
        self.forces[rows] = forces[: len(rows)]
        if self.stress is not None:
            self.stress[places] = stress[: len(places)]
        if charges is not None:
            if self.charges is None:
                self.charges = np.empty(len(self._columns.numbers))
            self.charges[rows] = charges[: len(rows)]
        if self.distance is not None:
            self.distance[rows] = self._domain.distance(features[: len(rows)])

    def relative_distance(self) -> np.ndarray:
        """Return the distances of the atoms in units of the boundary of the domain, (A,)."""
        return self.distance / self._domain.border

    @property
    def has_expected_errors(self) -> bool:
        """Whether the domain has expected errors of the forces."""
        return self._domain is not None and atom_domain.FORCES in self._domain.errors

    def expected_errors(self) -> np.ndarray:
        """Return the expected force errors of the atoms (eV/Å), (A,)."""
        return self._domain.expected_error(atom_domain.FORCES, self.distance)


def _fully_periodic(columns: Columns) -> np.ndarray:
    """Return whether structures are periodic in three directions, (S,)."""
    return np.zeros(len(columns), bool) if columns.pbc is None else columns.pbc.all(axis=1)


def _centered(columns: Columns) -> Columns:
    """Move structures without a cell to the origin, which keeps digits in float32."""
    periodic = np.zeros(len(columns), bool) if columns.pbc is None else columns.pbc.any(axis=1)
    center = np.add.reduceat(columns.positions, columns.offsets[:-1]) / columns.n_atoms[:, None]
    center[periodic] = 0.0
    positions = columns.positions - np.repeat(center, columns.n_atoms, axis=0)
    return dataclasses.replace(columns, positions=positions)


def _cast(params, dtype):
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def evaluate_batch(model, energy_scale, with_stress, with_features, params, graph):
    """Return energies (G,), forces (N, 3), stress (G, 3, 3), charges (N,), features (N, F)."""
    log.info("compiling the predictions for batches of %d atoms", len(graph.nodes["positions"]))
    out = evaluate(model, params, graph, energy_scale, with_stress)
    features = invariant_features(model, params, graph) if with_features else None
    return out.energy, out.forces, out.stress, out.properties.get("partial_charges"), features
