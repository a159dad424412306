"""What all calculators for ASE share: padding to few sizes, one program for each, checks, state, threads, copies."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase import Atoms
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.geometry import wrap_positions
from ase.outputs import Properties, all_outputs
from ase.stress import full_3x3_to_voigt_6_stress
from ase.vibrations import VibrationsData

from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.shapes import SizeBucket, SizeBuckets
from mlip_jax.potential import Evaluation, Potential, example_graph
from mlip_jax.simulation.calculators.packing import pack, unpack
from mlip_jax.structure import STATES, electronic_value

# Columns of a Hessian times directed edges that are in work at a time; a column of an edge takes a few kilobytes.
_COLUMN_EDGES = 1 << 16


class PaddedCalculator(Calculator):
    """The part of a calculator that does not depend on how many force fields it evaluates.

    A subclass gives `_params`, `_evaluate`, `_hessian_columns` and `_results`, in which the evaluations of several
    force fields may stand along a leading axis.

    Attributes:
      dtype: float32, or float64 for all of the calculation.
      num_compiles: Programs compiled so far.
      predictions: See MLIPCalculator.
    """

    implemented_properties = ["energy", "free_energy", "forces", "energies", "stress"]

    def __init__(self, potentials: Sequence[Potential], dtype: str):
        """
        Args:
          potentials: Of one cutoff.
          dtype: "float32" or "float64".

        Raises:
          ValueError: Another dtype.
        """
        super().__init__()
        if dtype not in ("float32", "float64"):
            raise ValueError(f'dtype must be "float32" or "float64", received {dtype!r}')
        self.dtype = np.dtype(dtype)
        self._members = tuple(_cast(potential, self.dtype) for potential in potentials)
        self._warned_of = set()
        self.predictions: dict[str, np.ndarray] = {}
        self._cutoff = self._members[0].cutoff
        self._long_range_cutoff = self._members[0].long_range_cutoff
        self._predicted = tuple(sorted(set.intersection(*(self._predictions(m) for m in self._members))))
        if "partial_charges" in self._predicted:
            self.implemented_properties = [*self.implemented_properties, "charges", "dipole"]
        self._start_anew()

    def _predictions(self, potential: Potential) -> set[str]:
        """Names of what a model predicts for each atom besides energies; traces it, compiles nothing."""
        with jax.enable_x64(self.dtype == np.float64):
            out = jax.eval_shape(potential.model.apply, potential.params, example_graph(self.dtype))
        return set(out.properties)

    # --- What a subclass is ---

    def _params(self) -> Any:
        """Pytree of arrays on the host that the next two are handed."""
        raise NotImplementedError

    def _evaluate(self, params: Any, graph: jraph.GraphsTuple, with_stress: bool) -> Evaluation:
        """Pure."""
        raise NotImplementedError

    def _hessian_columns(self, params: Any, graph: jraph.GraphsTuple, directions: jax.Array) -> jax.Array:
        """Pure; see potential.hessian_columns."""
        raise NotImplementedError

    def _results(self, atoms: Atoms, positions: np.ndarray, out: np.ndarray, stress: np.ndarray | None
                 ) -> dict[str, Any]:
        """Results from atomic energies, forces and predictions side by side, (..., n_atoms, 4 + predictions)."""
        raise NotImplementedError

    # --- What ASE calls ---

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """As ASE's: None where a calculation is needed but not allowed. Threads wait for each other.

        Raises:
          PropertyNotImplementedError: Not a property of this force field, or not of this structure.
          CalculatorSetupError: No atoms are given and none were before.
          ValueError, CalculationFailed: See `calculate`.
        """
        with self._lock:
            if atoms is None and self.atoms is None and name in self.implemented_properties:
                raise CalculatorSetupError(f"{name} of what? This calculator has seen no atoms yet; hand them over, or "
                                           "set atoms.calc and ask the atoms")
            return super().get_property(name, atoms, allow_calculation)

    def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=all_changes) -> None:
        """Fill `results` with everything that there is for `atoms`, whatever part of it is asked for.

        Raises:
          ValueError: No atoms, positions that are not finite, an element that the force field never saw, or a
            periodic structure for a force field whose long-range terms have no cutoff.
          PropertyNotImplementedError: Stress of a structure that is not periodic in all directions, or the dipole
            of one that is periodic.
          CalculationFailed: The force field gives NaN or infinite numbers.
        """
        # not through Calculator.calculate, which also looks after a directory on disk
        if atoms is not None:
            self.atoms = atoms.copy()
        if not system_changes and all(name in self.results for name in properties):
            return
        self.results = {}
        atoms = self.atoms
        self._check(atoms, properties)
        positions = centred(atoms)
        bucket, packed = self._pack(atoms, positions)
        with jax.enable_x64(self.dtype == np.float64):
            out, stress = self._run(bucket, *packed, bool(atoms.pbc.all()))
        self.results = self._results(atoms, positions, np.asarray(out)[..., :len(atoms), :].astype(np.float64), stress)

    def get_hessian(self, atoms: Atoms) -> np.ndarray:
        """Second derivatives of the energy by the positions, exact: (3 n_atoms, 3 n_atoms) float64, eV/Å².

        Row and column 3 i + x are atom i along x. For a periodic structure the images of an atom move with it (the
        Hessian at the zone centre). Made a block of columns at a time, forward over reverse mode, so that memory
        does not grow with their number; compiled once for each size. The result is symmetric: it is the mean of what
        was computed and its transpose, which differ by rounding.

        Raises:
          ValueError, CalculationFailed: See `calculate`.
        """
        with self._lock:
            self._check(atoms, ())
            bucket, packed = self._pack(atoms, centred(atoms))
            size, blocks = 3 * len(atoms), []
            with jax.enable_x64(self.dtype == np.float64):
                for start in range(0, size, _columns_at_once(bucket)):
                    block = np.asarray(self._run_hessian(bucket, *packed, np.int32(start)))
                    blocks.append(block.reshape(len(block), -1)[:, :size])
        hessian = np.concatenate(blocks)[:size].astype(np.float64)
        if not np.isfinite(hessian).all():
            raise CalculationFailed("the force field gives NaN or infinite second derivatives here; are atoms on top "
                                    "of each other?")
        return 0.5 * (hessian + hessian.T)

    def get_vibrations(self, atoms: Atoms, indices: Sequence[int] | None = None) -> VibrationsData:
        """ASE's vibrations of the exact Hessian: modes, frequencies, zero-point energy, see ase.vibrations.

        Args:
          atoms: At a minimum, if the frequencies are to mean something.
          indices: Atoms that move; by default all that no constraint holds.

        Raises:
          ValueError, CalculationFailed: See `calculate`.
        """
        hessian, atoms = self.get_hessian(atoms), atoms.copy()
        if indices is None:
            indices = VibrationsData.indices_from_constraints(atoms)
        rows = (3 * np.asarray(indices, int)[:, None] + np.arange(3)).ravel()
        return VibrationsData.from_2d(atoms, hessian[np.ix_(rows, rows)], indices)

    def export_properties(self) -> Properties:
        """Results that ASE has names for."""
        return Properties({name: value for name, value in self.results.items() if name in all_outputs})

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What has changed since the last calculation, as ASE names it, "charge" and "num_unpaired_electrons".

        Compares exactly, whatever `tol` is: ASE's comparison costs as much as all else on the host together.
        """
        old = self.atoms
        if old is None:
            return list(all_changes)
        arrays = {"positions": (old.positions, atoms.positions), "numbers": (old.numbers, atoms.numbers),
                  "cell": (old.cell.array, atoms.cell.array), "pbc": (old.pbc, atoms.pbc)}
        # their bytes: NumPy's own comparison is ten times slower for small arrays
        changed = [name for name, (a, b) in arrays.items() if a.tobytes() != b.tobytes()]
        return changed + [name for name in STATES if electronic_value(old, name) != electronic_value(atoms, name)]

    def _check(self, atoms, properties) -> None:
        if len(atoms) == 0:
            raise ValueError("the structure has no atoms; a force field needs at least one")
        if not np.isfinite(atoms.positions).all():
            bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
            raise ValueError(
                f"positions must be finite, received NaN or infinite values for {len(bad)} of {len(atoms)} atoms, "
                f"the first of them atom {bad[0]}: {atoms.positions[bad[0]]}")
        if atoms.pbc.any() and not atoms.cell.array.any(axis=1)[atoms.pbc].all():
            raise ValueError(f"pbc is {atoms.pbc.tolist()} but a periodic direction has no lattice vector: "
                             f"{atoms.cell.array.tolist()}; give the cell, or set pbc to False there")
        for member in self._members:
            member.check_elements(atoms.numbers)
        if "stress" in properties and not atoms.pbc.all():
            raise PropertyNotImplementedError(
                f"stress needs a cell that is periodic in all three directions, received pbc={atoms.pbc.tolist()}")
        if "dipole" in properties and atoms.pbc.any():
            raise PropertyNotImplementedError(
                f"a periodic structure has no dipole moment, received pbc={atoms.pbc.tolist()}")
        self._check_state_known(atoms, "charge", "charges", "total charges")
        self._check_state_known(atoms, "num_unpaired_electrons", "spins", "numbers of unpaired electrons")

    def _check_state_known(self, atoms, key: str, statistic: str, words: str) -> None:
        value = electronic_value(atoms, key)
        if value == 0 or key in self._warned_of:
            return
        trained_on = [m.metadata.get("statistics", {}).get(statistic, [0.0]) for m in self._members]
        strange = [known or [0.0] for known in trained_on  # None: not known of an imported force field
                   if known is not None and value not in (known or [0.0])]
        if not strange:
            return
        self._warned_of.add(key)
        warnings.warn(
            f"atoms.info['{key}'] is {value:g}, but this force field was trained on {words} "
            f"{', '.join(f'{c:g}' for c in strange[0])} only; do not expect its energies to be right",
            UserWarning, stacklevel=2)

    def _results_of(self, potential: Potential, atoms, positions, out: np.ndarray, stress
                    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Results and predictions of one force field, from (n_atoms, 4 + predictions) and (1 or 2, 3, 3) or None."""
        energies, forces = potential.reference_energies[atoms.numbers] + out[:, 0], np.array(out[:, 1:4])
        energy = float(energies.sum())
        if not np.isfinite(out).all():
            raise CalculationFailed(
                "the force field gives NaN or infinite energies or forces here; are atoms on top of each other, or "
                "has the dynamics blown up?")
        results = {"energy": energy, "free_energy": energy, "energies": energies, "forces": forces}
        if stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(np.asarray(stress)[0].astype(np.float64))
        predictions = {name: np.array(out[:, 4 + n]) for n, name in enumerate(self._predicted)}
        if "partial_charges" in self._predicted:
            charges = results["charges"] = predictions["partial_charges"].copy()
            if not atoms.pbc.any():
                results["dipole"] = charges @ positions
        return results, predictions

    # --- Programs ---

    def _pack(self, atoms, positions) -> tuple[SizeBucket, tuple[np.ndarray, np.ndarray]]:
        pbc = atoms.pbc
        periodic = bool(pbc.any())
        box = (atoms.cell.array, pbc) if periodic else (None, None)
        neighbors = neighbor_list(positions, self._cutoff, *box)
        _check_apart(positions, neighbors)
        reach = self._long_range_cutoff
        long_range = None if reach is None else long_range_list(positions, reach, *box)
        n_pair = None if reach is None else len(long_range[0])
        bucket = self._buckets.choose(len(atoms), len(neighbors.senders), n_pair, periodic)
        return bucket, pack(
            atoms.numbers, positions, neighbors, bucket, self.dtype, charge=electronic_value(atoms, "charge"),
            spin=electronic_value(atoms, "num_unpaired_electrons"), cell=box[0], long_range=long_range)

    def _start_anew(self) -> None:
        """What a copy does not share with the original."""
        self.num_compiles = 0
        self._lock = threading.RLock()
        self._buckets = SizeBuckets(self._long_range_cutoff)
        self._programs = None

    def _run(self, bucket: SizeBucket, floats: np.ndarray, ints: np.ndarray, with_stress: bool):
        evaluation, _, leaves = self._compiled()
        return evaluation(leaves, bucket, floats, ints, with_stress)

    def _run_hessian(self, bucket: SizeBucket, floats: np.ndarray, ints: np.ndarray, start: np.int32):
        _, hessian, leaves = self._compiled()
        return hessian(leaves, bucket, floats, ints, start)

    def _compiled(self):
        if self._programs is None:
            # Parameters are an argument: as fast as constants, and not copied into each program.
            leaves, structure = jax.tree.flatten(self._params())
            evaluation, hessian = (functools.partial(f, structure) for f in (self._traced, self._traced_hessian))
            self._programs = (jax.jit(evaluation, static_argnums=(1, 4)), jax.jit(hessian, static_argnums=1),
                              jax.device_put(leaves))
        return self._programs

    def _traced(self, structure, leaves, bucket, floats, ints, with_stress):
        """Atomic energies, forces and predictions side by side, (..., nodes, 4 + predictions), and stress or None."""
        self.num_compiles += 1  # runs when JAX traces, which it does once for each program
        params, graph = jax.tree.unflatten(structure, leaves), unpack(bucket, floats, ints)
        out = self._evaluate(params, graph, with_stress)
        parts = [out.energies[..., None], out.forces, *(out.properties[name][..., None] for name in self._predicted)]
        # the sum of the energies is made on the host, in float64
        return jnp.concatenate(parts, axis=-1), out.stress

    def _traced_hessian(self, structure, leaves, bucket, floats, ints, start):
        """Columns of the Hessian from `start` on, (columns, nodes, 3); those of padding atoms are zero."""
        self.num_compiles += 1
        params, graph = jax.tree.unflatten(structure, leaves), unpack(bucket, floats, ints)
        columns = start + jnp.arange(_columns_at_once(bucket))
        directions = jax.nn.one_hot(columns, 3 * bucket.budget.n_node, dtype=floats.dtype)
        return self._hessian_columns(params, graph, directions.reshape(-1, bucket.budget.n_node, 3))

    def __getstate__(self):
        left = ("num_compiles", "_lock", "_buckets", "_programs")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start_anew()


def _cast(potential: Potential, dtype) -> Potential:
    return dataclasses.replace(potential, params=jax.tree.map(lambda leaf: np.asarray(leaf, dtype), potential.params))


def _columns_at_once(bucket: SizeBucket) -> int:
    budget = bucket.budget
    return int(np.clip(_COLUMN_EDGES // max(budget.n_edge + budget.n_pair, 1), 1, 3 * (budget.n_node - 1)))


def centred(atoms) -> np.ndarray:
    """Positions close to the origin: float32 has fewer digits for a molecule that drifted away."""
    positions = atoms.positions
    if atoms.pbc.any():
        positions = wrap_positions(positions, atoms.cell.array, atoms.pbc, eps=0)
    return positions if atoms.pbc.all() else positions - positions.sum(axis=0) / len(atoms)


def _check_apart(positions, neighbors) -> None:
    """Raise CalculationFailed for two atoms in one place: an edge of length zero would pass for padding."""
    same = (positions[neighbors.senders] == positions[neighbors.receivers]).all(axis=1)
    if neighbors.shifts is not None:
        same &= ~neighbors.shifts.any(axis=1)
    if same.any():
        edge = int(np.argmax(same))
        raise CalculationFailed(f"atoms {neighbors.receivers[edge]} and {neighbors.senders[edge]} are in the same "
                                "place; forces are not defined there")
