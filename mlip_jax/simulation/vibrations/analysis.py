"""Vibrational analysis of molecules: `vibrations` relaxes them tightly and computes their modes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.io import write

from mlip_jax.datasets.molecules.arguments import molecule_records
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.files import atomic_open
from mlip_jax.foreign_text import one_line_values
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators import stationarity
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.simulation.relaxation.result import Relaxation
from mlip_jax.simulation.vibrations.normal_modes import normal_modes, rotational_symmetry_number
from mlip_jax.simulation.vibrations.thermochemistry import (
    APPROXIMATIONS,
    IDEAL_GAS,
    Thermochemistry,
    thermochemistry,
)
from mlip_jax.structure import electronic_value


@dataclasses.dataclass(frozen=True)
class VibrationOptions:
    """Options of a vibrational analysis.

    Attributes:
      temperature: Temperature (K).
      pressure: Pressure (bar).
      symmetry_number: Rotational symmetry number of all molecules; None: found from the geometry.
      approximation: "ideal_gas" (translation, rigid rotor, harmonic vibrations) or "harmonic"
        (vibrations alone).
      isotopes: Masses (amu) by element in place of the average ones, such as {"H": 2.0141}.
      fmax: Largest force (eV/Å) of the relaxation in float64.
      max_steps: Maximum number of steps of the relaxation.

    Raises:
      ValueError: If a value is invalid.
    """

    temperature: float = 298.15
    pressure: float = 1.01325
    symmetry_number: int | None = None
    approximation: str = IDEAL_GAS
    isotopes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fmax: float = 1e-4
    max_steps: int = 1000

    def __post_init__(self):
        for name in ("temperature", "pressure", "fmax"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive, received {getattr(self, name)}")
        if self.symmetry_number is not None and self.symmetry_number < 1:
            raise ValueError(f"symmetry_number must be at least 1, received {self.symmetry_number}")
        if self.approximation not in APPROXIMATIONS:
            raise ValueError(
                f"approximation must be one of {APPROXIMATIONS}, received {self.approximation!r}"
            )
        for symbol, mass in self.isotopes.items():
            if symbol not in atomic_numbers or not 0 < mass < np.inf:
                raise ValueError(
                    "isotopes must be masses (amu) by element, as {'H': 2.0141}; received "
                    f"{symbol!r}: {mass!r}"
                )


@dataclasses.dataclass(frozen=True)
class VibrationalAnalysis:
    """Vibrations of one molecule of n atoms with K modes.

    Attributes:
      atoms: Relaxed molecule with its masses, energy and forces; the input if `reason` is not "".
      reason: Reason why there is no result, or "".
      fmax: Largest force of the relaxed molecule (eV/Å).
      energy: Energy of the relaxed molecule (eV).
      frequencies: Wave numbers (1/cm), ascending, (K,); imaginary ones are negative.
      displacements: Cartesian displacements of the modes, each of norm 1, (K, n, 3).
      reduced_masses: Reduced masses of the modes (amu), (K,).
      thermochemistry: Zero-point energy, enthalpy, entropy and free energy; None without a result.
    """

    atoms: Atoms
    reason: str = ""
    fmax: float = np.nan
    energy: float = np.nan
    frequencies: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    displacements: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0, 3)))
    reduced_masses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    thermochemistry: Thermochemistry | None = None

    @property
    def num_imaginary(self) -> int:
        """Return the number of imaginary modes: 0 at a minimum, 1 at a transition state."""
        return int((self.frequencies < 0).sum())

    def write_modes(self, path: Any, **info: Any) -> None:
        """Write the modes as extended XYZ: the minimum with array "mode" in one frame per mode."""
        frames = []
        for k, frequency in enumerate(self.frequencies.tolist()):
            frame = self.atoms.copy()
            frame.info.clear()
            frame.set_array("mode", self.displacements[k])
            frame.info |= one_line_values(info) | {"mode": k, "frequency_per_cm": frequency}
            frames.append(frame)
        if isinstance(path, str | Path):
            with atomic_open(Path(path), "w") as file:
                write(file, frames, format="extxyz")
        else:
            write(path, frames, format="extxyz")


def vibrations(
    molecules: Any, force_field: Any = BUNDLED, *, relaxed: bool = False, **options: Any
) -> list[VibrationalAnalysis]:
    """Relax molecules tightly in float64 and compute their frequencies and thermochemistry.

    Frequencies are those of the exact Hessian without translations and rotations.

    >>> (result,) = vibrations("CCO", "runs/spice", temperature=300)  # doctest: +SKIP
    >>> result.frequencies, result.thermochemistry.free_energy  # doctest: +SKIP

    Args:
      molecules: ASE's Atoms, a SMILES, the path of a file of molecules, or a list of these. Masses
        that are set in Atoms are used.
      force_field: Force field in any form that `simulation.force_fields.load_mean_force_field` accepts:
        a workdir, "IMPORTER:FILE", a `Potential` or a calculator; the mean of several. By default
        that of the package.
      relaxed: Whether the molecules are at stationary points already, which may be transition
        states, and are not relaxed.
      **options: Fields of `VibrationOptions`.

    Returns:
      One result per molecule, with a reason if there are no frequencies.

    Raises:
      ValueError: If an option is invalid, or forces are not the gradient of the energy.
      CheckpointError: If there is no force field at this location.
    """
    settings, potential = VibrationOptions(**options), load_mean_force_field(force_field)
    check_forces(potential)
    records = [record for group in molecule_records(molecules) for record in group]
    given = {k: record.atoms for k, record in enumerate(records) if record.atoms is not None}
    minima = dict(minimize(given, potential, settings, relaxed))
    calculator = MLIPCalculator(potential, dtype="float64")
    TrustCheck.load(force_field, potential).warn(
        [m.atoms for m in minima.values() if m.status in ("converged", "step limit")], "molecules"
    )
    return [
        analyze(minima[k], calculator, settings)
        if k in minima
        else VibrationalAnalysis(Atoms(), record.failure)
        for k, record in enumerate(records)
    ]


def check_forces(potential: Potential) -> None:
    """Raise ValueError if the forces of a force field are not the gradient of its energy.

    A relaxation then ends where the forces vanish, and not at a minimum of the energy, whose second
    derivatives are the Hessian.
    """
    if not potential.conservative:
        raise ValueError(
            "the forces of this force field are not the gradient of its energy (they are "
            f"{potential.origin_of_forces}), so a relaxed molecule is not at a minimum of the "
            "energy and has no frequencies"
        )


def minimize(given: Mapping[Any, Atoms], potential: Potential, settings, relaxed: bool = False):
    """Yield (key, relaxation) for molecules; with `relaxed`, of zero steps."""
    relaxer = Relaxer(
        potential,
        fmax=settings.fmax,
        max_steps=0 if relaxed else settings.max_steps,
        dtype="float64",
        molecules_only=True,
    )
    yield from relaxer.stream(given.items())


def analyze(
    minimum: Relaxation, calculator: MLIPCalculator, settings: VibrationOptions
) -> VibrationalAnalysis:
    """Compute frequencies and thermochemistry of a relaxed molecule.

    Warns if forces are too large for frequencies.

    Args:
      minimum: Result of a relaxation.
      calculator: Calculator in float64 of the force field.
      settings: Options.
    """
    if minimum.status not in ("converged", "step limit"):
        return VibrationalAnalysis(minimum.atoms, minimum.reason or minimum.status)
    atoms = minimum.atoms
    masses = _masses(atoms, settings.isotopes)
    atoms.set_masses(masses)
    stationarity.warn_if_not_stationary(atoms.get_forces())
    modes = normal_modes(calculator.get_hessian(atoms), atoms.positions, masses)
    symmetry_number = settings.symmetry_number or rotational_symmetry_number(
        atoms.numbers, atoms.positions, masses
    )
    thermo = thermochemistry(
        atoms,
        minimum.energy,
        modes.frequencies,
        linear=modes.linear,
        symmetry_number=symmetry_number,
        unpaired=electronic_value(atoms, "num_unpaired_electrons"),
        temperature=settings.temperature,
        pressure=settings.pressure,
        approximation=settings.approximation,
    )
    return VibrationalAnalysis(
        atoms,
        "",
        minimum.fmax,
        minimum.energy,
        modes.frequencies,
        modes.displacements,
        modes.reduced_masses,
        thermo,
    )


def _masses(atoms: Atoms, isotopes: Mapping[str, float]) -> np.ndarray:
    """Return the masses (amu), (n,), with those of isotopes for whole elements."""
    masses = atoms.get_masses()
    for symbol, mass in isotopes.items():
        masses[atoms.numbers == atomic_numbers[symbol]] = mass
    return masses
