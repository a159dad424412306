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
from mlip_jax.potential import Potential
from mlip_jax.simulation.ensemble_mean import members_of
from mlip_jax.simulation.relaxation.journal import Layout
from mlip_jax.simulation.relaxation.relax import Relaxation
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.coverage import unseen_states
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
FRAME, MOL_BLOCK, TRAJECTORY = "xyz", "sdf", "trajectory.xyz"
LAYOUT = Layout(COLUMNS, (FRAME, MOL_BLOCK, TRAJECTORY))
# _WHOLE: integers that ASE reads back as text unchanged; other numbers, booleans and lists change.
_WHOLE = re.compile(r"-?[1-9][0-9]{0,17}|0")
# _MOL_BLOCK_REACH: largest coordinate (Å) in ten characters, four of them after the decimal point
_MOL_BLOCK_REACH = 9999.0
# _STATE: charge or number of unpaired electrons in a frame that is not zero
_STATE = re.compile(rb"\b(?:charge|num_unpaired_electrons)=-?[0.]*[1-9]")
_TRUTH = {"T", "F", "true", "false", "True", "False", "TRUE", "FALSE"}


def failure_cells(record: MoleculeRecord) -> list[Any]:
    """Return the values of COLUMNS for a molecule that could not be built."""
    return [record.index, record.name, record.smiles, FAILED, record.failure, *[None] * 9]


def result_cells(record: MoleculeRecord, result: Relaxation) -> list[Any]:
    """Return the values of COLUMNS for a relaxation."""
    atoms = record.atoms
    distance = math.nan if result.status == FAILED else rmsd(atoms, result.atoms)
    return [
        record.index,
        record.name,
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
    ]


def domain_cells(
    potential: Potential, domains: Sequence[Domain | None], frames: Sequence[bytes]
) -> list[tuple[Any, Any]]:
    """Return the values of DOMAIN_COLUMNS for molecules. Computed in batches.

    Args:
      potential: The force field.
      domains: Domain of the force field, or of each member of an ensemble; None if it is unknown.
        Without any, only charges and spins that training never saw are known to be outside.
      frames: The piece FRAME of each molecule, b"" if there is none.
    """
    from ase.io import read

    cells: list[tuple[Any, Any]] = [("", "")] * len(frames)
    members = members_of(potential)
    known = [(m, domain) for m, domain in zip(members, domains) if domain is not None]
    with_frame = [i for i, piece in enumerate(frames) if piece and (known or _STATE.search(piece))]
    if not with_frame:
        return cells
    molecules = [read(io.StringIO(frames[i].decode()), format="extxyz") for i in with_frame]
    unseen = [bool(unseen_states(atoms, members)) for atoms in molecules]
    if not known:
        for i, is_unseen in zip(with_frame, unseen):
            cells[i] = ("", 1 if is_unseen else "")
        return cells
    columns = Columns.from_structures(map(from_ase, molecules))
    distances = np.max([atom_domain.farthest(m, domain, columns) for m, domain in known], axis=0)
    for i, is_unseen, distance in zip(with_frame, unseen, distances.tolist()):
        outside = is_unseen or not distance <= 1  # NaN is outside the domain
        cells[i] = (repr(distance) if math.isfinite(distance) else "", int(outside))
    return cells


def rmsd(start: Atoms, end: Atoms) -> float:
    """Return the root mean square distance of atoms in the same order (Å).

    The distance is minimized over translations and rotations, or over translations only if there is
    a cell. NaN if positions are not finite.
    """
    a, b = end.positions - end.positions.mean(0), start.positions - start.positions.mean(0)
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
    info = {"index": record.index, "name": record.name, "smiles": record.smiles}
    end = info | {"status": result.status, "steps": result.steps, "fmax": float(result.fmax)}
    encoded = {FRAME: frame(result.atoms, end | electronic_state(record.atoms), result.energy)}
    if (
        mol_blocks
        and record.bonds is not None
        and np.abs(result.atoms.positions).max() < _MOL_BLOCK_REACH
    ):
        encoded[MOL_BLOCK] = _mol_block(record, result)
    if result.frames:
        info |= electronic_state(record.atoms)
        encoded[TRAJECTORY] = b"".join(
            frame(atoms, info | {"frame": i}, **atoms.calc.results)
            for i, atoms in enumerate(result.frames)
        )
    return encoded


def frame(
    atoms: Atoms, info: Mapping[str, Any], energy: float, forces: np.ndarray | None = None
) -> bytes:
    """Return a frame of extended XYZ (Å, eV, eV/Å) with further keys.

    ASE reads strings back unchanged, except integers. Masses and other arrays of the atoms are
    kept; momenta are those of the geometry before the relaxation and are omitted.
    """
    from ase.io import write

    numbers = {k: v for k, v in info.items() if not isinstance(v, str)}
    plain = atoms.copy()
    plain.info = numbers
    plain.arrays.pop("momenta", None)
    if math.isfinite(energy):
        plain.calc = SinglePointCalculator(plain, energy=float(energy), forces=forces)
    buffer = io.StringIO()
    write(buffer, plain, format="extxyz", write_results=True)
    count, comment, rest = buffer.getvalue().split("\n", 2)
    texts = [f"{k}={_quote(v)}" for k, v in info.items() if isinstance(v, str) and _line(v)]
    return "\n".join([count, " ".join([comment, *texts]), rest]).encode("utf-8", "replace")


def _quote(text: str) -> str:
    """Return a string as a value of extended XYZ.

    ASE writes backslashes unchanged but reads them as escapes, and it reads strings that look like
    numbers or booleans as such.
    """
    text = _line(text)
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


def _mol_block(record: MoleculeRecord, result: Relaxation) -> bytes:
    """Return an entry of an SDF file."""
    from rdkit import Chem
    from rdkit.Geometry import Point3D

    molecule = Chem.Mol(record.bonds)
    conformer = Chem.Conformer(molecule.GetNumAtoms())
    conformer.Set3D(True)
    for i, position in enumerate(result.atoms.positions.tolist()):
        conformer.SetAtomPosition(i, Point3D(*position))
    molecule.AddConformer(conformer, assignId=True)
    molecule.SetProp("_Name", _line(record.name or str(record.index)))
    values = {
        "index": record.index,
        "smiles": record.smiles,
        "status": result.status,
        "steps": result.steps,
        "energy_ev": repr(float(result.energy)),
        "fmax_ev_per_ang": repr(float(result.fmax)),
    }
    fields = "".join(f">  <{name}>\n{_line(str(value))}\n\n" for name, value in values.items())
    return f"{Chem.MolToMolBlock(molecule)}{fields}$$$$\n".encode("utf-8", "replace")


def _line(text: str) -> str:
    """Return the text on one line, with single spaces and without unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
