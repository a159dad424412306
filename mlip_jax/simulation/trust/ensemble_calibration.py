"""What error to expect of an ensemble: the spread of its members, scaled to the errors of structures held out.

Members that were trained on the same data err together, and their spread is too small by a factor that is much the
same everywhere. If errors are Gaussian with standard deviation factor * spread, the most likely factor is the root of
the mean of (error / spread)² (Laves et al., MIDL 2020: σ scaling). There is one for energies and one for forces:

    energies   of structures, error and spread over the number of atoms. The factor is that of total energies, too, for
               both are divided alike; the floor below is what needs a unit that large and small molecules share
    forces     of atoms: the spread is the root mean square over the three components, each of which is an error

A few members can agree by chance, which says nothing, but would weigh without limit in that mean: the spread counts as
no less than what a tenth of the structures (or atoms) have.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.store.store import Store
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.workdir import write_json

log = logging.getLogger(__name__)

FILE = "ensemble.json"
_FLOOR = 0.1  # share of the spreads that count as the one above them


@dataclasses.dataclass(frozen=True)
class Scale:
    """factor: Of the spread. floor: What the spread counts at least, in its unit."""

    factor: float
    floor: float

    @classmethod
    def fit(cls, errors: np.ndarray, spread: np.ndarray) -> Scale | None:
        """Of errors (N,) or, of several components, (N, C), NaN where not known, and spreads (N,); None of no errors.

        Raises:
          ValueError: The members agree nearly everywhere.
        """
        errors = errors.reshape(len(spread), -1)
        known = np.isfinite(errors).all(axis=1)
        if not known.any():
            return None
        floor = float(np.quantile(spread[known], _FLOOR))
        if not floor > 0:
            raise ValueError("the members of the ensemble agree to the last digit: are they the same force field?")
        z = errors[known] / np.maximum(spread[known], floor)[:, None]
        return cls(float(np.sqrt(np.mean(z**2))), floor)

    def expected(self, spread: np.ndarray) -> np.ndarray:
        """Standard deviation of the error to expect where the members spread so, in the unit of `spread`."""
        return self.factor * np.maximum(spread, self.floor)


@dataclasses.dataclass(frozen=True)
class EnsembleErrors:
    """The mean of the members, and their spread, on S structures with A atoms.

    Attributes:
      n_atoms: (S,).
      energy_error, energy_spread: Mean less reference (NaN without a label), and standard deviation over the members
        (of a sample), (S,) eV/atom.
      force_error, force_spread: The same of force components, (A, 3) eV/Å, and of their root mean square, (A,).
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
    """From the spread of certain members to the error to expect.

    Attributes:
      members: Digests of the force fields.
      energy, forces: Scales of eV/atom and eV/Å; None where there were no labels.
      num_structures: That it was made by.
    """

    members: tuple[str, ...]
    energy: Scale | None
    forces: Scale | None
    num_structures: int

    @classmethod
    def fit(cls, potentials: Sequence[Potential], evaluated: EnsembleErrors) -> Calibration:
        """By errors on structures that none of the members was trained on.

        Raises:
          ValueError: There are no labels, or the members agree nearly everywhere.
        """
        made = cls(tuple(p.digest() for p in potentials), Scale.fit(evaluated.energy_error, evaluated.energy_spread),
                   Scale.fit(evaluated.force_error, evaluated.force_spread), len(evaluated))
        if made.energy is None and made.forces is None:
            raise ValueError("a calibration needs structures with energies or forces; these have neither")
        return made

    def save(self, path: str | Path, **more: Any) -> None:
        """Write JSON; `more` is kept beside it, for people to read."""
        scales = {name: None if scale is None else dataclasses.asdict(scale)
                  for name, scale in (("energy", self.energy), ("forces", self.forces))}
        write_json(Path(path), {"members": list(self.members), **scales, "num_structures": self.num_structures} | more)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote, from the file or the folder that holds ensemble.json.

        Raises:
          FileNotFoundError: There is none. ValueError: It is damaged.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no calibration of an ensemble is there; configs/ensemble.py makes one")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scales = {name: None if content[name] is None else Scale(float(content[name]["factor"]),
                                                                     float(content[name]["floor"]))
                      for name in ("energy", "forces")}
            return cls(tuple(content["members"]), num_structures=int(content["num_structures"]), **scales)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no calibration of an ensemble, or damaged ({error}); make it anew with "
                             "configs/ensemble.py") from error

    def check(self, potentials: Sequence[Potential]) -> None:
        """Raise ValueError where the members are not those that it was made for, in whatever order."""
        own = [p.digest() for p in potentials]
        if sorted(own) != sorted(self.members):
            raise ValueError(f"the calibration is of other members: {', '.join(self.members)}; those of this ensemble "
                             f"are {', '.join(own)}. Make one for them with configs/ensemble.py")

    def properties(self) -> tuple[str, ...]:
        """Names of what `results` gives."""
        return tuple(f"{name}_expected_error" for name in ("energy", "forces") if getattr(self, name) is not None)

    def results(self, energy_std: float, forces_std: np.ndarray) -> dict[str, Any]:
        """What a calculator tells beside its standard deviations of the energy, eV, and of the forces, (n_atoms, 3).

        Returns:
          energy_expected_error, eV, and forces_expected_error, (n_atoms,) eV/Å, of each component: standard deviations
          of the errors to expect. The mean |error| of a Gaussian is 0.8 of it.
        """
        made: dict[str, Any] = {}
        if self.energy is not None:
            made["energy_expected_error"] = float(len(forces_std) * self.energy.expected(energy_std / len(forces_std)))
        if self.forces is not None:
            made["forces_expected_error"] = self.forces.expected(_over_components(forces_std))
        return made


def evaluate(potentials: Sequence[Potential], store: Store, indices: np.ndarray) -> EnsembleErrors:
    """The ensemble on structures of a store.

    Raises:
      ValueError: Fewer than two members, the same one twice, or elements that one of them was not trained on.
    """
    digests = [p.digest() for p in potentials]
    if len(set(digests)) < max(2, len(digests)):
        raise ValueError("an ensemble needs two or more force fields, each another one; received "
                         f"{', '.join(digests) or 'none'}")
    energies, forces = zip(*(energies_and_forces(p, store, indices) for p in potentials))
    columns = store.take(indices, labels_only=True)
    return EnsembleErrors(
        columns.n_atoms, (np.mean(energies, axis=0) - columns.energy) / columns.n_atoms,
        np.std(energies, axis=0, ddof=1) / columns.n_atoms, np.mean(forces, axis=0) - columns.forces,
        _over_components(np.std(forces, axis=0, ddof=1)))


def _over_components(forces_std: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(forces_std**2, axis=1))


def held_out(workdirs: Sequence[str | Path], potentials: Sequence[Potential], part: str, most: int, seed: int = 0
             ) -> tuple[Store, np.ndarray, list[str]]:
    """(store, structures there, notes) of a part of the first member's data that no member was trained on.

    Args:
      workdirs, potentials: Of the members. part: "valid" or "test". most: Structures; more are drawn by `seed`.

    Raises:
      DatasetError: The data of the first member are gone, or nothing is left.
    """
    own, notes = RunData.load(workdirs[0]), []
    chosen = _not_trained_on(own, part, workdirs[1:], notes)
    known = set.intersection(*(set(p.elements) for p in potentials))
    kept = [here[[set(s.numbers.tolist()) <= known for s in columns]]
            for here, columns in own.store.chunks(chosen, labels_only=True)]
    strange, chosen = len(chosen), np.concatenate([*kept, chosen[:0]])
    if strange > len(chosen):
        notes.append(f"{strange - len(chosen)} structures of the part {part!r} are left out: a member does not know "
                     "their elements.")
    if not len(chosen):
        raise DatasetError(f"{workdirs[0]}: its part {part!r} holds no structure to judge the ensemble by. "
                           + " ".join(notes))
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, most, replace=False))
    return own.store, chosen, notes


def _not_trained_on(own: RunData, part: str, others: Sequence[str | Path], notes: list[str]) -> np.ndarray:
    """Structures of a part of the first member's data that the others were not trained on."""
    whole = chosen = np.asarray(own.parts.get(part, []), np.int64)
    # Whole molecules, which training knows from other conformers; but where the first member's own training does so (a
    # random split), the structures themselves.
    unit = np.asarray(own.store.index("molecule"))
    if np.isin(unit[chosen], unit[own.parts["train"]]).any():
        unit = np.arange(len(own.store))
    for workdir in others:
        trained = _trained_on(workdir, own.store)
        if trained is None:
            notes.append(f"{Path(workdir).name} has another data set than {own.workdir.name}, or one that is not "
                         "there: it may have been trained on structures that the ensemble is judged by.")
        else:
            chosen = chosen[~np.isin(unit[chosen], unit[trained])]
    if len(chosen) < len(whole):
        notes.append(f"{len(whole) - len(chosen)} structures of the part {part!r} are left out: other members were "
                     "trained on them, or on other conformers of their molecules.")
    return chosen


def _trained_on(workdir: str | Path, store: Store) -> np.ndarray | None:
    """Structures of `store` that a run was trained on; None where that cannot be told."""
    try:
        data = RunData.load(workdir)
    except DatasetError as error:
        log.warning("%s", error)
        return None
    return data.parts["train"] if data.store.digest() == store.digest() else None
