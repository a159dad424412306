"""Output of a relaxation: a row of numbers, a frame, a mol block and the trajectory."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.geometry import kabsch_align
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.foreign_text import one_line
from mlip_jax.potential import Potential
from mlip_jax.simulation.ensemble_mean import members_of
from mlip_jax.simulation.relaxation.journal import Layout
from mlip_jax.simulation.relaxation.result import Relaxation
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.coverage import judges_odd_electrons, judges_sizes, unseen_states
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.structure import electronic_state, from_ase

FAILED = "failed"
# Energies in eV, forces in eV/Å (the largest norm on an atom), distances in Å, charges in e.
COLUMNS = (
    "index",
    "name",
    "smiles",
    "status",
    "reason",
    "n_atoms",
    "charge",
    "geometry",
    "steps",
    "energy_start_ev",
    "energy_ev",
    "fmax_start_ev_per_ang",
    "fmax_ev_per_ang",
    "rmsd_ang",
)
# DOMAIN_COLUMNS: distance of the farthest atom of the relaxed geometry (1 at the border), and 1 if
# it is outside the domain, otherwise 0; computed after all relaxations.
DOMAIN_COLUMNS = ("domain_distance", "outside_domain")
# CELL_COLUMNS: further columns if cells are relaxed; empty for molecules.
CELL_COLUMNS = ("volume_start_ang3", "volume_ang3", "pressure_gpa")
FRAME, MOL_BLOCK, TRAJECTORY = "xyz", "sdf", "trajectory.xyz"
LAYOUT = Layout(COLUMNS, (FRAME, MOL_BLOCK, TRAJECTORY))
CELL_LAYOUT = Layout((*COLUMNS, *CELL_COLUMNS), LAYOUT.kinds)
# _WHOLE: integers that ASE reads back as text unchanged; other numbers, booleans and lists change.
_WHOLE = re.compile(r"-?[1-9][0-9]{0,17}|0")
# _MOL_BLOCK_REACH: largest coordinate (Å) in ten characters, four of them after the decimal point
_MOL_BLOCK_REACH = 9999.0
# _STATE: charge or number of unpaired electrons in a frame that is not zero, or periodicity
_STATE = re.compile(rb'\b(?:charge|num_unpaired_electrons)=-?[0.]*[1-9]|\bpbc="[^"]*T')
_TRUTH = {"T", "F", "true", "false", "True", "False", "TRUE", "FALSE"}


def failure_cells(record: MoleculeRecord, layout: Layout = LAYOUT) -> list[Any]:
    """Return the values of layout.columns for a molecule that could not be built."""
    known = [record.index, record.table_name, record.smiles, FAILED, record.failure]
    return [*known, *[None] * (len(layout.columns) - len(known))]


def result_cells(record: MoleculeRecord, result: Relaxation, layout: Layout = LAYOUT) -> list[Any]:
    """Return the values of layout.columns for a relaxation; LAYOUT or CELL_LAYOUT."""
    atoms = record.atoms
    distance = math.nan if result.status == FAILED else rmsd(atoms, result.atoms)
    return [
        record.index,
        record.table_name,
        record.smiles,
        result.status,
        result.reason,
        len(atoms),
        atoms.info["charge"],
        record.geometry,
        result.steps,
        result.energy_start,
        result.energy,
        result.fmax_start,
        result.fmax,
        distance,
        *(_cell_values(result) if layout == CELL_LAYOUT else ()),
    ]


def _cell_values(result: Relaxation) -> tuple[float | None, ...]:
    """Return the values of CELL_COLUMNS."""
    if result.cell_start is None:
        return None, None, None
    volume = abs(float(np.linalg.det(result.cell_start)))
    return volume, float(result.atoms.cell.volume), result.pressure


def domain_cells(
    potential: Potential, domains: Sequence[Domain | None], frames: Sequence[bytes]
) -> list[tuple[Any, Any]]:
    """Return the values of DOMAIN_COLUMNS for molecules. Computed in batches.

    Args:
      potential: The force field.
      domains: Domain of the force field, or of each member of an ensemble; None if it is unknown.
        Without any, only charges, spins, periodicity, sizes and odd numbers of electrons without
        training data are known to be outside.
      frames: The piece FRAME of each molecule, b"" if there is none.
    """
    from ase.io import read

    cells: list[tuple[Any, Any]] = [("", "")] * len(frames)
    members, known = members_of(potential), any(domains)
    every = known or judges_odd_electrons(members) or judges_sizes(members)
    with_frame = [i for i, piece in enumerate(frames) if piece and (every or _STATE.search(piece))]
    if not with_frame:
        return cells
    molecules = [read(io.StringIO(frames[i].decode()), format="extxyz") for i in with_frame]
    unseen = [bool(unseen_states(atoms, members)) for atoms in molecules]
    if not known:
        for i, is_unseen in zip(with_frame, unseen):
            cells[i] = ("", 1 if is_unseen else "")
        return cells
    columns = Columns.from_structures(map(from_ase, molecules))
    distances = atom_domain.farthest_of_members(members, domains, columns)
    for i, is_unseen, distance in zip(with_frame, unseen, distances.tolist()):
        outside = is_unseen or not distance <= 1  # NaN is outside the domain
        cells[i] = (repr(distance) if math.isfinite(distance) else "", int(outside))
    return cells


def rmsd(start: Atoms, end: Atoms) -> float:
    """Return the root mean square distance of atoms in the same order (Å).

    The distance is minimized over translations and rotations, or over translations only if there is
    a cell. If the cell has changed, the relaxed positions are mapped to the cell of the start. NaN
    if positions are not finite.
    """
    moved = end.positions
    if start.pbc.any() and end.pbc.any() and not np.array_equal(start.cell.array, end.cell.array):
        before, after = (a.cell.complete().array for a in (start, end))
        moved = moved @ np.linalg.solve(after, before)
    a, b = moved - moved.mean(0), start.positions - start.positions.mean(0)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    if not start.pbc.any():
        b = b @ kabsch_align(a[None], b[None])[0]
    return float(np.sqrt(((a - b) ** 2).sum(1).mean()))


def pieces(record: MoleculeRecord, result: Relaxation, mol_blocks: bool) -> dict[str, bytes]:
    """Return the pieces of LAYOUT for a relaxation.

    There are no pieces if the relaxation failed or positions are not finite, and no mol block if
    bonds are unknown or coordinates do not fit into one.
    """
    if result.status == FAILED or not np.isfinite(result.atoms.positions).all():
        return {}
    info = {"index": record.index, "name": record.table_name, "smiles": record.smiles}
    end = info | {"status": result.status, "steps": result.steps, "fmax": float(result.fmax)}
    stress = result.atoms.calc.results.get("stress") if result.atoms.calc else None
    state = electronic_state(record.atoms)
    encoded = {FRAME: frame(result.atoms, end | state, result.energy, stress=stress)}
    if (
        mol_blocks
        and record.bonds is not None
        and np.abs(result.atoms.positions).max() < _MOL_BLOCK_REACH
    ):
        encoded[MOL_BLOCK] = mol_block(record, result)
    if result.frames:
        info |= state
        encoded[TRAJECTORY] = b"".join(
            frame(atoms, info | {"frame": i}, **atoms.calc.results)
            for i, atoms in enumerate(result.frames)
        )
    return encoded


def frame(
    atoms: Atoms,
    info: Mapping[str, Any],
    energy: float,
    forces: np.ndarray | None = None,
    stress: np.ndarray | None = None,
) -> bytes:
    """Return a frame of extended XYZ (Å, eV, eV/Å, eV/Å³) with further keys.

    ASE reads strings back unchanged, except integers. Masses and other arrays of the atoms are
    kept; momenta are those of the geometry before the relaxation and are omitted.
    """
    from ase.io import write

    numbers = {k: v for k, v in info.items() if not isinstance(v, str)}
    plain = atoms.copy()
    plain.info = numbers
    plain.arrays.pop("momenta", None)
    if math.isfinite(energy):
        plain.calc = SinglePointCalculator(
            plain, energy=float(energy), forces=forces, stress=stress
        )
    buffer = io.StringIO()
    write(buffer, plain, format="extxyz", write_results=True)
    count, comment, rest = buffer.getvalue().split("\n", 2)
    texts = [f"{k}={_quote(v)}" for k, v in info.items() if isinstance(v, str) and one_line(v)]
    return "\n".join([count, " ".join([comment, *texts]), rest]).encode("utf-8", "replace")


def _quote(text: str) -> str:
    """Return a string as a value of extended XYZ.

    ASE writes backslashes unchanged but reads them as escapes, and it reads strings that look like
    numbers or booleans as such.
    """
    text = one_line(text)
    words = re.findall(r"[^\s,]+", text)
    if not _WHOLE.fullmatch(text) and (
        all(map(_is_number, words)) or all(w in _TRUTH for w in words) or text.startswith("_JSON")
    ):
        text = f"_JSON {json.dumps(text, ensure_ascii=False)}"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_number(text: str) -> bool:
    """Return whether `float` accepts the text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def mol_block(record: MoleculeRecord, result: Relaxation) -> bytes:
    """Return an entry of an SDF file."""
    from rdkit import Chem
    from rdkit.Geometry import Point3D

    molecule = Chem.Mol(record.bonds)
    conformer = Chem.Conformer(molecule.GetNumAtoms())
    conformer.Set3D(True)
    for i, position in enumerate(result.atoms.positions.tolist()):
        conformer.SetAtomPosition(i, Point3D(*position))
    molecule.AddConformer(conformer, assignId=True)
    molecule.SetProp("_Name", _sdf_line(record.display_name))
    values = {
        "index": record.index,
        "smiles": record.smiles,
        "status": result.status,
        "steps": result.steps,
        "energy_ev": repr(float(result.energy)),
        "fmax_ev_per_ang": repr(float(result.fmax)),
    }
    fields = "".join(f">  <{name}>\n{_sdf_line(str(value))}\n\n" for name, value in values.items())
    return f"{Chem.MolToMolBlock(molecule)}{fields}$$$$\n".encode("utf-8", "replace")


def _sdf_line(text: str) -> str:
    """Escape a text as one line of an SDF file, so that it does not end an entry or begin a field."""
    text = one_line(text)
    return f" {text}" if text.startswith(("$$$$", ">")) else text
