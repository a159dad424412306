"""Base class of the ASE calculators: checks, state, threads, copies and vibrations."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import ase
import jax
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

from mlip_jax import models
from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators import conservation, stationarity
from mlip_jax.simulation.calculators.compiled import (
    CompiledForceField,
    PureForceField,
    columns_at_once,
)
from mlip_jax.simulation.ensemble_mean import members_of
from mlip_jax.simulation.trust.coverage import unseen_states
from mlip_jax.simulation.user_warnings import OutsideDomainWarning, warn
from mlip_jax.structure import STATES, electronic_value


class PaddedCalculator(Calculator):
    """Base class of the calculators of one and of several force fields.

    A subclass implements `_params`, `_force_field` and `_results`. The results of several force
    fields may be stacked along a leading axis.

    Attributes:
      dtype: float32, or float64 for the whole calculation.
      predictions: Per-atom predictions other than energies, see `MLIPCalculator`.
      conservative: Whether forces are minus the gradient of the energy.
    """

    implemented_properties = ["energy", "free_energy", "forces", "energies", "stress"]

    def __init__(self, potentials: Sequence[Potential], dtype: str):
        """Create a calculator.

        Args:
          potentials: Force fields with the same cutoff.
          dtype: "float32" or "float64".

        Raises:
          ValueError: If dtype is neither of the two.
        """
        super().__init__()
        keep_compiled_programs()
        if dtype not in ("float32", "float64"):
            raise ValueError(f'dtype must be "float32" or "float64", received {dtype!r}')
        self.dtype = np.dtype(dtype)
        self._members = tuple(_cast(potential, self.dtype) for potential in potentials)
        self._warned_of = set()
        self.predictions: dict[str, np.ndarray] = {}
        self._cutoff = self._members[0].cutoff
        self._long_range_cutoff = self._members[0].long_range_cutoff
        self.conservative = conservation.warn_if_not_conservative(self._members)
        self.implemented_properties = conservation.properties(
            self._members, self.implemented_properties
        )
        self._predicted = tuple(
            sorted(set.intersection(*(self._predictions(m) for m in self._members)))
        )
        if "partial_charges" in self._predicted:
            self.implemented_properties = [*self.implemented_properties, "charges", "dipole"]
        self._reset_compiled()

    def _predictions(self, potential: Potential) -> set[str]:
        """Return the names of the per-atom predictions of a model other than energies."""
        # an ensemble mean predicts what all of its members predict
        outputs = (models.outline(p.model, self.dtype)[0] for p in members_of(potential))
        return set.intersection(*(set(out.properties) for out in outputs))

    # --- Implemented by subclasses ---

    def _params(self) -> Any:
        """Return the parameters that `_force_field` expects, a pytree of host arrays."""
        raise NotImplementedError

    def _force_field(self) -> PureForceField:
        """Return the force fields without their parameters."""
        raise NotImplementedError

    def _results(
        self, atoms: Atoms, positions: np.ndarray, out: np.ndarray, stress: np.ndarray | None
    ) -> dict[str, Any]:
        """Return the results.

        Args:
          out: Atomic energies, forces and predictions, concatenated, (..., n_atoms, 4 +
            predictions).
        """
        raise NotImplementedError

    # --- Interface of ASE ---

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """Return a property as in ASE, waiting for other threads.

        Return None if a calculation is needed but not allowed.

        Raises:
          PropertyNotImplementedError: If the force field does not have this property, or not for
            this structure.
          CalculatorSetupError: If no atoms are passed and there was no earlier calculation.
          ValueError, CalculationFailed: As for `calculate`.
        """
        with self._lock:
            if atoms is None and self.atoms is None and name in self.implemented_properties:
                raise CalculatorSetupError(
                    f"{name} requires atoms, and this calculator has not received any. Pass "
                    "them, or set atoms.calc and call the method of the atoms."
                )
            return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self, atoms: Atoms | None = None, properties=("energy",), system_changes=all_changes
    ) -> None:
        """Fill `results` with all properties available for `atoms`, whichever are requested.

        Raises:
          ValueError: If there are no atoms, a position is not finite, the force field was not
            trained on an element, or the structure is periodic and the force field has long-range
            terms without a cutoff.
          PropertyNotImplementedError: If the stress is requested for a structure that is not
            periodic in all directions, or the dipole for a periodic one.
          CalculationFailed: If the force field returns NaN or infinite values.
        """
        # Calculator.calculate is not called: it also manages a directory on disk
        if atoms is not None:
            self.atoms = atoms.copy()
        if not system_changes and all(name in self.results for name in properties):
            return
        self.results = {}
        atoms = self.atoms
        self._check(atoms, properties)
        positions = centered(atoms)
        bucket, packed = self.compiled.pack(atoms, positions)
        with jax.enable_x64(self.dtype == np.float64):
            out, stress = self.compiled.run(bucket, *packed, self._with_stress(atoms))
        self.results = self._results(
            atoms, positions, np.asarray(out)[..., : len(atoms), :].astype(np.float64), stress
        )

    def get_hessian(self, atoms: Atoms) -> np.ndarray:
        """Return the exact Hessian of the energy with respect to the positions.

        For a periodic structure the images of an atom move with it (the Hessian at the zone
        center). Blocks of columns are computed in forward-over-reverse mode, so the memory of a
        block is bounded. Compiled once per size. Rounding makes the computed matrix slightly
        asymmetric; the result is the mean of the matrix and its transpose.

        Returns:
          Hessian (eV/Å²), (3 n_atoms, 3 n_atoms), float64. Row and column 3 i + x belong to atom i
          and direction x.

        Raises:
          PropertyNotImplementedError: If the energy of the force field has no derivatives.
          ValueError, CalculationFailed: As for `calculate`.
        """
        hessian = self.get_hessian_columns(atoms, len(atoms))
        return 0.5 * (hessian + hessian.T)

    def get_hessian_columns(self, atoms: Atoms, num_atoms: int) -> np.ndarray:
        """Return the columns of the Hessian that belong to the first atoms, transposed.

        It costs about one evaluation per column. See `get_hessian`.

        Args:
          atoms: Structure.
          num_atoms: Number of atoms whose columns are computed.

        Returns:
          Columns (eV/Å²), (3 num_atoms, 3 n_atoms), float64.
        """
        conservation.check_hessian(self._members)
        with self._lock:
            self._check(atoms, ())
            bucket, packed = self.compiled.pack(atoms, centered(atoms))
            size, blocks = 3 * len(atoms), []
            with jax.enable_x64(self.dtype == np.float64):
                for start in range(0, 3 * num_atoms, columns_at_once(bucket)):
                    block = np.asarray(self.compiled.run_hessian(bucket, *packed, np.int32(start)))
                    # (columns, nodes, 3) -> (columns, 3 n_atoms), without padding
                    blocks.append(block.reshape(len(block), -1)[:, :size])
        hessian = np.concatenate(blocks)[: 3 * num_atoms].astype(np.float64)
        if not np.isfinite(hessian).all():
            raise CalculationFailed(
                "the force field gives NaN or infinite second derivatives. Check whether atoms "
                "overlap."
            )
        return hessian

    def get_vibrations(
        self, atoms: Atoms, indices: Sequence[int] | None = None
    ) -> ase.vibrations.VibrationsData:
        """Return the vibrations of the exact Hessian: modes, frequencies and zero-point energy.

        Warns if the largest force on a mobile atom exceeds 0.01 eV/Å: the structure is then not
        close enough to a minimum for meaningful frequencies.

        Args:
          atoms: Structure at a minimum, as after `relax(atoms, ..., fmax=0.001, dtype="float64")`.
          indices: Indices of the mobile atoms; by default all atoms without a constraint.

        Returns:
          Vibrations, see ase.vibrations.

        Raises:
          ValueError, CalculationFailed: As for `calculate`.
        """
        from ase.vibrations import VibrationsData  # 0.3 s, with matplotlib

        hessian, atoms = self.get_hessian(atoms), atoms.copy()
        if indices is None:
            indices = VibrationsData.indices_from_constraints(atoms)
        stationarity.warn_if_not_stationary(self.get_property("forces", atoms)[indices])
        rows = (3 * np.asarray(indices, int)[:, None] + np.arange(3)).ravel()
        return VibrationsData.from_2d(atoms, hessian[np.ix_(rows, rows)], indices)

    def export_properties(self) -> Properties:
        """Return the results that ASE has names for."""
        return Properties(
            {name: value for name, value in self.results.items() if name in all_outputs}
        )

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """Return the names of the changes since the last calculation.

        The names are ASE's, "charge" and "num_unpaired_electrons". The comparison is exact and
        ignores `tol`: ASE's comparison takes as long as all other host work of a calculation
        together.
        """
        old = self.atoms
        if old is None:
            return list(all_changes)
        arrays = {
            "positions": (old.positions, atoms.positions),
            "numbers": (old.numbers, atoms.numbers),
            "cell": (old.cell.array, atoms.cell.array),
            "pbc": (old.pbc, atoms.pbc),
        }
        # compare bytes: NumPy's comparison is ten times slower for small arrays
        changed = [name for name, (a, b) in arrays.items() if a.tobytes() != b.tobytes()]
        return changed + [
            name for name in STATES if electronic_value(old, name) != electronic_value(atoms, name)
        ]

    def _check(self, atoms, properties) -> None:
        """Raise if the structure or the requested properties are unsupported; see `calculate`."""
        if len(atoms) == 0:
            raise ValueError("the structure has no atoms; a force field requires at least one")
        if not np.isfinite(atoms.positions).all():
            bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
            raise ValueError(
                f"positions must be finite, received NaN or infinite values for {len(bad)} of "
                f"{len(atoms)} atoms; the first is atom {bad[0]}: {atoms.positions[bad[0]]}"
            )
        if atoms.pbc.any() and not atoms.cell.array.any(axis=1)[atoms.pbc].all():
            raise ValueError(
                f"pbc is {atoms.pbc.tolist()} but a periodic direction has no lattice vector: "
                f"{atoms.cell.array.tolist()}. Set the cell, or set pbc to False in this "
                "direction."
            )
        for member in self._members:
            member.check_elements(atoms.numbers)
        if "stress" in properties and not atoms.pbc.all():
            raise PropertyNotImplementedError(
                "stress requires a cell that is periodic in all three directions, received "
                f"pbc={atoms.pbc.tolist()}"
            )
        if "dipole" in properties and atoms.pbc.any():
            raise PropertyNotImplementedError(
                "the dipole moment of a periodic structure is undefined, received "
                f"pbc={atoms.pbc.tolist()}"
            )
        for state in unseen_states(atoms, self._members):
            if state.name not in self._warned_of:
                self._warned_of.add(state.name)
                warn(f"{state.message}; its energies may be wrong", OutsideDomainWarning)

    def _with_stress(self, atoms) -> bool:
        """Return whether the stress of the structure is computed."""
        return bool(atoms.pbc.all()) and "stress" in self.implemented_properties

    def _results_of(
        self, potential: Potential, atoms, positions, out: np.ndarray, stress
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the results and the predictions of one force field.

        Args:
          out: Atomic energies, forces and predictions, (n_atoms, 4 + predictions).
          stress: Stress of the structure and, if padded, of the padding graph, (1 or 2, 3, 3); or
            None.
        """
        energies, forces = (
            potential.reference_energies[atoms.numbers] + out[:, 0],
            np.array(out[:, 1:4]),
        )
        energy = float(energies.sum())
        if not np.isfinite(out).all():
            raise CalculationFailed(
                "the force field gives NaN or infinite energies or forces. Check whether atoms "
                "overlap or the dynamics are unstable."
            )
        results = {"energy": energy, "free_energy": energy, "energies": energies, "forces": forces}
        if stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(np.asarray(stress)[0].astype(np.float64))
        predictions = {name: np.array(out[:, 4 + n]) for n, name in enumerate(self._predicted)}
        if "partial_charges" in self._predicted:
            charges = results["charges"] = predictions["partial_charges"].copy()
            if not atoms.pbc.any():
                results["dipole"] = charges @ positions
        return results, predictions

    # --- Copies ---

    @property
    def num_compiles(self) -> int:
        """Return the number of programs used so far.

        Calculators of equal models share their programs and compile each program once.
        """
        return self.compiled.num_compiles

    def _reset_compiled(self) -> None:
        """Reset the state that a copy does not share with the original."""
        self._lock = threading.RLock()
        self.compiled = CompiledForceField(
            params=self._params,
            force_field=self._force_field,
            predicted=self._predicted,
            dtype=self.dtype,
            cutoff=self._cutoff,
            long_range_cutoff=self._long_range_cutoff,
        )

    def __getstate__(self):
        not_shared = ("_lock", "compiled")
        return {name: value for name, value in self.__dict__.items() if name not in not_shared}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset_compiled()


def _cast(potential: Potential, dtype) -> Potential:
    """Return the potential with its parameters cast to `dtype`, on the host."""
    return dataclasses.replace(
        potential, params=jax.tree.map(lambda leaf: np.asarray(leaf, dtype), potential.params)
    )


def centered(atoms) -> np.ndarray:
    """Return the positions, shifted or wrapped close to the origin.

    float32 has fewer digits for a molecule that has drifted away from the origin.
    """
    positions = atoms.positions
    if atoms.pbc.any():
        positions = wrap_positions(positions, atoms.cell.array, atoms.pbc, eps=0)
    return positions if atoms.pbc.all() else positions - positions.sum(axis=0) / len(atoms)
