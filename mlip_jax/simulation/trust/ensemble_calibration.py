"""Expected error of an ensemble: spread of its members, scaled to errors on held-out structures.

Members that were trained on the same data make correlated errors, so their spread is too small by a
factor that is similar everywhere. If errors are Gaussian with standard deviation factor * spread,
the most likely factor is the root of the mean of (error / spread)² (Laves et al., MIDL 2020: σ
scaling). There is one factor for energies and one for forces:

    energies   of structures, with error and spread per atom. The factor also holds for total
               energies, since both are divided by the same number; the floor below needs a unit
               that large and small molecules share
    forces     of atoms: the spread is the root mean square over the three components, each of
               which is an error

A few members can agree by chance. This carries no information but would have unlimited weight in
the mean, so each spread counts at least as the 10 % quantile of the spreads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.store.store import Store
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.workdir import write_json

FILE = "ensemble.json"
_FLOOR = 0.1  # quantile of the spreads that is the floor


@dataclasses.dataclass(frozen=True)
class Scale:
    """Scale from a spread to the expected error.

    Attributes:
      factor: Expected error over spread.
      floor: Smallest spread that is used, in the unit of the spread.
    """

    factor: float
    floor: float

    @classmethod
    def fit(cls, errors: np.ndarray, spread: np.ndarray) -> Scale | None:
        """Fit a scale; None if no error is known.

        Args:
          errors: Errors, (N,) or, for several components, (N, C); NaN if unknown.
          spread: Spreads, (N,).

        Raises:
          ValueError: If the members agree nearly everywhere.
        """
        errors = errors.reshape(len(spread), -1)
        known = np.isfinite(errors).all(axis=1)
        if not known.any():
            return None
        floor = float(np.quantile(spread[known], _FLOOR))
        if not floor > 0:
            raise ValueError(
                "all members of the ensemble give identical results. Check that they are "
                "different force fields."
            )
        z = errors[known] / np.maximum(spread[known], floor)[:, None]
        return cls(float(np.sqrt(np.mean(z**2))), floor)

    def expected(self, spread: np.ndarray) -> np.ndarray:
        """Return the standard deviation of the error to expect, in the unit of `spread`."""
        return self.factor * np.maximum(spread, self.floor)


@dataclasses.dataclass(frozen=True)
class EnsembleErrors:
    """Errors of the mean of the members, and their spread, for S structures with A atoms.

    Attributes:
      n_atoms: Number of atoms, (S,).
      energy_error: Mean minus reference energy (eV/atom), (S,); NaN without a label.
      energy_spread: Sample standard deviation of the energy over the members (eV/atom), (S,).
      force_error: Mean minus reference forces (eV/Å), (A, 3); NaN without a label.
      force_spread: Root mean square over the components of the sample standard deviations (eV/Å),
        (A,).
    """

    n_atoms: np.ndarray
    energy_error: np.ndarray
    energy_spread: np.ndarray
    force_error: np.ndarray
    force_spread: np.ndarray

    def __len__(self) -> int:
        return len(self.n_atoms)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration from the spread of certain members to the expected error.

    Attributes:
      members: Digests of the force fields.
      energy: Scale of the energies (eV/atom); None without labels.
      forces: Scale of the forces (eV/Å); None without labels.
      num_structures: Number of structures of the calibration.
    """

    members: tuple[str, ...]
    energy: Scale | None
    forces: Scale | None
    num_structures: int

    @classmethod
    def fit(cls, potentials: Sequence[Potential], evaluated: EnsembleErrors) -> Calibration:
        """Fit a calibration to errors on structures that no member was trained on.

        Raises:
          ValueError: If there are no labels, or if the members agree nearly everywhere.
        """
        calibration = cls(
            tuple(p.digest() for p in potentials),
            Scale.fit(evaluated.energy_error, evaluated.energy_spread),
            Scale.fit(evaluated.force_error, evaluated.force_spread),
            len(evaluated),
        )
        if calibration.energy is None and calibration.forces is None:
            raise ValueError(
                "the calibration requires structures with energies or forces; these have neither"
            )
        return calibration

    def save(self, path: str | Path, **more: Any) -> None:
        """Write the calibration as JSON. `more` is stored along with it for human readers."""
        scales = {
            name: None if scale is None else dataclasses.asdict(scale)
            for name, scale in (("energy", self.energy), ("forces", self.forces))
        }
        write_json(
            Path(path),
            {"members": list(self.members), **scales, "num_structures": self.num_structures} | more,
        )

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Load a calibration that `save` wrote.

        Args:
          path: The file, or the folder that contains ensemble.json.

        Raises:
          FileNotFoundError: If there is none.
          ValueError: If it is corrupted.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no calibration of an ensemble. Create one with configs/ensemble.py."
            )
        try:
            content = parse_json(read_bytes(path))
            scales = {
                name: None
                if content[name] is None
                else Scale(float(content[name]["factor"]), float(content[name]["floor"]))
                for name in ("energy", "forces")
            }
            return cls(
                tuple(content["members"]), num_structures=int(content["num_structures"]), **scales
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a valid ensemble calibration ({error}). Regenerate it with "
                "configs/ensemble.py."
            ) from error

    def check(self, potentials: Sequence[Potential]) -> None:
        """Raise ValueError if the calibration is of other members. The order does not matter."""
        digests = [p.digest() for p in potentials]
        if sorted(digests) != sorted(self.members):
            raise ValueError(
                f"the calibration belongs to other members: {', '.join(self.members)}; this "
                f"ensemble has {', '.join(digests)}. Create one for them with configs/ensemble.py."
            )

    def properties(self) -> tuple[str, ...]:
        """Return the names of the results of `results`."""
        return tuple(
            f"{name}_expected_error"
            for name in ("energy", "forces")
            if getattr(self, name) is not None
        )

    def results(self, energy_std: float, forces_std: np.ndarray) -> dict[str, Any]:
        """Return the expected errors for one structure.

        Args:
          energy_std: Standard deviation of the energy (eV).
          forces_std: Standard deviations of the forces (eV/Å), (n_atoms, 3).

        Returns:
          energy_expected_error (eV), and forces_expected_error (eV/Å), (n_atoms,), per component.
          Both are standard deviations of the errors to expect. The mean |error| of a Gaussian is
          0.8 of it.
        """
        expected: dict[str, Any] = self.expected(
            np.array([len(forces_std)]), np.array([energy_std]), forces_std
        )
        if self.energy is not None:
            expected["energy_expected_error"] = float(expected["energy_expected_error"][0])
        return expected

    def expected(
        self, n_atoms: np.ndarray, energy_std: np.ndarray, forces_std: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the expected errors for S structures with A atoms, as `results`.

        Args:
          n_atoms: Number of atoms, (S,).
          energy_std: Standard deviations of the energies (eV), (S,).
          forces_std: Standard deviations of the forces (eV/Å), (A, 3).

        Returns:
          energy_expected_error, (S,), and forces_expected_error, (A,), if they are calibrated.
        """
        errors = {}
        if self.energy is not None:
            errors["energy_expected_error"] = n_atoms * self.energy.expected(energy_std / n_atoms)
        if self.forces is not None:
            errors["forces_expected_error"] = self.forces.expected(_over_components(forces_std))
        return errors


def evaluate(potentials: Sequence[Potential], store: Store, indices: np.ndarray) -> EnsembleErrors:
    """Evaluate an ensemble on structures of a store.

    Args:
      potentials: Members of the ensemble.
      store: Structures with labels.
      indices: Structures of the store to evaluate.

    Raises:
      ValueError: If there are fewer than two members, one occurs twice, or one was not trained on
        an element.
    """
    digests = [p.digest() for p in potentials]
    if len(set(digests)) < max(2, len(digests)):
        raise ValueError(
            "an ensemble needs at least two force fields, all different; received "
            f"{', '.join(digests) or 'none'}"
        )
    energies, forces = zip(*(energies_and_forces(p, store, indices) for p in potentials))
    columns = store.take(indices, labels_only=True)
    return EnsembleErrors(
        columns.n_atoms,
        (np.mean(energies, axis=0) - columns.energy) / columns.n_atoms,
        np.std(energies, axis=0, ddof=1) / columns.n_atoms,
        np.mean(forces, axis=0) - columns.forces,
        _over_components(np.std(forces, axis=0, ddof=1)),
    )


def _over_components(forces_std: np.ndarray) -> np.ndarray:
    """Return the root mean square over the components, (A, 3) -> (A,)."""
    return np.sqrt(np.mean(forces_std**2, axis=1))
