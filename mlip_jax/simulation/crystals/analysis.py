"""Relaxed cell, equation of state and phonons of crystals with a force field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.dft.kpoints import monkhorst_pack

from mlip_jax.datasets.molecules.arguments import molecule_records
from mlip_jax.graphs.long_range import find_lattice_obstacle
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.calculators.conservation import already_warned
from mlip_jax.simulation.crystals.equation_of_state import EquationOfState, fit_equation_of_state
from mlip_jax.simulation.crystals.phonons import (
    compute_force_constants,
    heat_capacity,
    interaction_range,
    supercell_repeats,
    supercell_spacing,
    zero_point_energy,
)
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.symmetry import check_symprec
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.simulation.relaxation.result import Relaxation

# IMAGINARY: frequency (THz) below which a mode counts as imaginary; rounding explains smaller ones.
IMAGINARY = -0.1
_FAILED = ("failed", "diverged")


@dataclasses.dataclass(frozen=True)
class CrystalOptions:
    """Options of the analysis of crystals.

    Attributes:
      fmax: Largest force of a relaxed crystal, on atoms and cell (eV/Å).
      max_steps: Maximum number of steps of a relaxation.
      symprec: Tolerance (Å) of the space groups that crystals keep, at all volumes; requires spglib.
        None keeps only those of crystals with ASE's constraint FixSymmetry.
      volume_range: Largest relative change of the volume in the equation of state.
      num_volumes: Number of volumes; 0 skips the equation of state.
      supercell_length: Minimum distance of the lattice planes of the supercell of the phonons (Å).
        Below twice the distance up to which atoms interact, the result has a remark. 0 skips the
        phonons.
      mesh: Wave vectors along each lattice vector for the density of states.
      temperature: Temperature of the heat capacity (K).
    """

    fmax: float = 1e-3
    max_steps: int = 1000
    symprec: float | None = None
    volume_range: float = 0.06
    num_volumes: int = 9
    supercell_length: float = 12.0
    mesh: int = 12
    temperature: float = 298.15

    def __post_init__(self):
        if self.num_volumes and self.num_volumes < 5:
            raise ValueError(f"num_volumes must be 0 or at least 5, received {self.num_volumes}")
        if not 0 < self.volume_range < 0.5:
            raise ValueError(
                f"volume_range must be above 0 and below 0.5, received {self.volume_range}"
            )
        check_symprec(self.symprec)


@dataclasses.dataclass(frozen=True)
class PhononBands:
    """Phonons along a path of wave vectors and on a mesh.

    Attributes:
      distances: Position of each wave vector on the path (1/Å), (Q,).
      ticks: Positions and labels of the special points.
      frequencies: Frequencies on the path (THz), (Q, 3 n); imaginary ones are negative.
      mesh: Frequencies on the mesh (THz), (points, 3 n).
    """

    distances: np.ndarray
    ticks: list[tuple[float, str]]
    frequencies: np.ndarray
    mesh: np.ndarray


@dataclasses.dataclass(frozen=True)
class CrystalAnalysis:
    """Properties of a crystal.

    Attributes:
      atoms: Relaxed crystal; the input if it could not be relaxed.
      reason: Reason why there is no result, or "".
      energy: Energy of the relaxed crystal (eV).
      volumes: Volumes of the equation of state (Å³).
      energies: Energies at these volumes (eV); NaN if a relaxation failed.
      eos: Equation of state, or None; `remark` has the reason.
      remark: Reason why a part is missing or unreliable, or "".
      bands: Phonons, or None if they were not requested.
      supercell: Numbers of cells of the supercell of the phonons, () without phonons.
      supercell_spacing: Smallest distance of its lattice planes (Å).
      interaction_range: Distance up to which an atom influences the energy of another one (Å). If
        the spacing is below twice this distance, `remark` says so.
      zero_point_energy: Zero-point energy per cell (eV).
      heat_capacity: Heat capacity at constant volume per cell (k_B).
    """

    atoms: Atoms
    reason: str = ""
    energy: float = np.nan
    volumes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    energies: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    eos: EquationOfState | None = None
    remark: str = ""
    bands: PhononBands | None = None
    supercell: tuple[int, ...] = ()
    supercell_spacing: float = np.nan
    interaction_range: float = np.nan
    zero_point_energy: float = np.nan
    heat_capacity: float = np.nan

    @property
    def lowest_frequency(self) -> float:
        """Lowest frequency (THz), negative if a mode is imaginary; NaN without phonons."""
        if self.bands is None:
            return np.nan
        return float(min(self.bands.frequencies.min(), self.bands.mesh.min()))


def crystal_properties(crystals: Any, force_field: Any, **options: Any) -> list[CrystalAnalysis]:
    """Relax the cells of crystals, and compute equations of state and phonons.

    >>> (result,) = crystal_properties(bulk("Cu"), "runs/metals")  # doctest: +SKIP
    >>> result.eos.bulk_modulus, result.lowest_frequency  # doctest: +SKIP

    Args:
      crystals: ASE's Atoms, the path of a file of structures, or a list of these.
      force_field: Force field in any form that `simulation.force_fields.load_mean_force_field` accepts.
      **options: Fields of `CrystalOptions`.

    Returns:
      One result per crystal, with a reason if it has none.

    Raises:
      ValueError: If an option is invalid.
      CheckpointError: If there is no force field at this location.
    """
    settings, potential = CrystalOptions(**options), load_mean_force_field(force_field)
    records = [record for group in molecule_records(crystals) for record in group]
    given = {k: record.atoms for k, record in enumerate(records) if record.atoms is not None}
    results = dict(analyze_crystals(given, potential, settings))
    TrustCheck.load(force_field, potential).warn(
        [r.atoms for r in results.values() if not r.reason], "crystals"
    )
    return [
        results.get(k, CrystalAnalysis(Atoms(), record.failure)) for k, record in enumerate(records)
    ]


def analyze_crystals(
    given: Mapping[Any, Atoms], potential: Potential, settings: CrystalOptions
) -> Iterator[tuple[Any, CrystalAnalysis]]:
    """Yield (key, result) of crystals. All are relaxed in batches, at all volumes."""
    shared = {"fmax": settings.fmax, "max_steps": settings.max_steps, "dtype": "float64"}
    periodic = {k: atoms for k, atoms in given.items() if atoms.pbc.all()}
    for k in given.keys() - periodic.keys():
        yield k, CrystalAnalysis(given[k], "it is not periodic in three directions")
    cells = Relaxer(potential, cell=CellFilter(), symprec=settings.symprec, **shared)
    relaxed = dict(cells.stream(periodic.items()))
    usable = {k: r for k, r in relaxed.items() if r.status not in _FAILED}
    for k in relaxed.keys() - usable.keys():
        yield k, CrystalAnalysis(relaxed[k].atoms, relaxed[k].reason or relaxed[k].status)
    factors = 1 + np.linspace(-settings.volume_range, settings.volume_range, settings.num_volumes)
    strained = {
        (k, i): scale_volume(result.atoms, factor)
        for k, result in usable.items()
        for i, factor in enumerate(factors)
    }
    with already_warned():
        relaxer = Relaxer(potential, **shared)
        calculator = MLIPCalculator(potential, dtype="float64")
    at_volumes = dict(relaxer.stream(strained.items()))
    for k, result in usable.items():
        points = [at_volumes[k, i] for i in range(len(factors))]
        yield k, _complete(result, factors, points, calculator, settings)


def scale_volume(atoms: Atoms, factor: float) -> Atoms:
    """Return a crystal with a multiple of the volume and with the constraints of the original."""
    scaled = atoms.copy()
    cell = atoms.cell.array * factor ** (1 / 3)
    scaled.set_cell(cell, scale_atoms=True, apply_constraint=False)
    return scaled


def _complete(
    relaxed: Relaxation, factors, points: list[Relaxation], calculator, settings: CrystalOptions
) -> CrystalAnalysis:
    """Return the properties of a relaxed crystal."""
    atoms, remarks, eos = relaxed.atoms, [], None
    unconverged = sum(p.status not in _FAILED and not p.converged for p in points)
    if not relaxed.converged:
        remarks.append(f"the crystal is not relaxed: its largest force is {relaxed.fmax:.2g} eV/Å")
    if unconverged:
        remarks.append(f"the atoms are not relaxed at {unconverged} of the volumes")
    volumes = atoms.cell.volume * factors
    energies = np.array([np.nan if p.status in _FAILED else p.energy for p in points])
    if settings.num_volumes:
        try:
            eos = fit_equation_of_state(volumes, energies)
        except ValueError as error:
            remarks.append(str(error))
    result = CrystalAnalysis(atoms, "", relaxed.energy, volumes, energies, eos, "; ".join(remarks))
    if not settings.supercell_length:
        return result
    repeats = supercell_repeats(atoms, settings.supercell_length)
    far, cell = calculator.potential.long_range_cutoff, np.diag(repeats) @ atoms.cell.array
    if reason := find_lattice_obstacle(far, cell, atoms.pbc):
        size = " × ".join(map(str, repeats))
        remarks.append(f"no phonons in a supercell of {size} cells: {reason}")
        return dataclasses.replace(result, remark="; ".join(remarks))
    spacing, reach = supercell_spacing(atoms, repeats), interaction_range(calculator.potential)
    if spacing < 2 * reach:
        remarks.append(
            f"the lattice planes of the supercell of the phonons are {spacing:.1f} Å apart, but "
            f"atoms interact up to {reach:.1f} Å; check phonons with a larger supercell, up to "
            f"supercell_length={2 * reach:.0f}"
        )
    constants = compute_force_constants(atoms, calculator, repeats)
    path, distances, ticks = _path(atoms)
    mesh = constants.frequencies(monkhorst_pack([settings.mesh] * 3))
    return dataclasses.replace(
        result,
        remark="; ".join(remarks),
        supercell=repeats,
        supercell_spacing=spacing,
        interaction_range=reach,
        bands=PhononBands(distances, ticks, constants.frequencies(path), mesh),
        zero_point_energy=zero_point_energy(mesh) / len(mesh),
        heat_capacity=heat_capacity(mesh, settings.temperature) / len(mesh),
    )


def _path(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, list[tuple[float, str]]]:
    """Return wave vectors along the special points, their distances, and the labels."""
    path = atoms.cell.bandpath(npoints=120, eps=1e-3)
    distances, positions, labels = path.get_linear_kpoint_axis()
    return path.kpts, distances, list(zip(np.asarray(positions).tolist(), labels))
