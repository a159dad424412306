"""Tests for frames, mol blocks and numbers of relaxations, read back by ASE and RDKit."""

import dataclasses
import io
import math

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mlip_jax.datasets.smiles.embedding import EmbeddingOptions, Entry, MoleculeRecord, embed_entry
from mlip_jax.simulation.relaxation.outputs import (
    CELL_LAYOUT,
    COLUMNS,
    failure_cells,
    frame,
    pieces,
    result_cells,
    rmsd,
)


@dataclasses.dataclass(frozen=True)
class Result:
    atoms: Atoms
    status: str = "converged"
    reason: str = ""
    steps: int = 7
    energy_start: float = -10.0
    energy: float = -11.123456789012345
    fmax_start: float = 2.0
    fmax: float = 0.04
    frames: list | None = None
    cell_start: np.ndarray | None = None
    pressure: float = math.nan


def record_of(smiles, name="name"):
    return embed_entry((Entry(3, "file line 4", name, smiles), EmbeddingOptions()))[0]


def moved(record, by=0.1):
    atoms = record.atoms.copy()
    atoms.positions += by * np.random.default_rng(0).normal(size=atoms.positions.shape)
    return atoms


def read_one(data):
    return read(io.StringIO(data.decode()), format="extxyz")


@pytest.mark.parametrize(
    "text",
    [
        "C/C=C\\C",
        "[O-]C=O",
        "a \"q\" 'b' {c} [d]",
        "C\\",
        "\\",
        '"',
        "T",
        "F",
        "true F",
        "1 2 3",
        "007",
        "1.5",
        "nan",
        "1e5",
        "_JSON [1",
        "a=b c",
        "é ü 分子",
        "[1,2]",
        ",",
        "x,",
        "[H]",
        "-",
        "0x10",
        "1_000",
    ],
)
def test_texts_round_trip(text):
    data = frame(molecule("H2O"), {"index": 5, "name": text, "smiles": text}, -1.5)
    atoms = read_one(data)
    assert (
        atoms.info["name"] == text
        and atoms.info["smiles"] == text
        and isinstance(atoms.info["name"], str)
    )
    assert atoms.info["index"] == 5 and atoms.get_potential_energy() == -1.5


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(text):
    expected = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    read_back = read_one(frame(molecule("H2O"), {"name": text, "index": 1}, math.nan)).info
    assert read_back["index"] == 1
    if expected.lstrip("-").isdecimal():
        assert str(read_back["name"]) == expected
    elif expected:
        assert read_back["name"] == expected
    else:
        assert "name" not in read_back


def test_numbers_of_pubchem_stay_numbers():
    assert read_one(frame(molecule("H2O"), {"name": "2244"}, math.nan)).info["name"] == 2244


def test_masses_are_written_and_momenta_are_not():
    """Detects isotopes that are lost in a relaxation, and velocities of another geometry."""
    water = molecule("H2O")
    water.set_masses([None, 2.0141, 2.0141])
    water.set_momenta(np.ones((3, 3)))
    read_back = read_one(frame(water, {"index": 1}, -1.5))
    np.testing.assert_allclose(read_back.get_masses(), water.get_masses(), rtol=1e-6)
    assert not read_back.has("momenta") and read_back.get_potential_energy() == -1.5


def test_frame_of_a_relaxation():
    record = record_of("C/C=C\\C")
    atoms = moved(record)
    atoms.set_constraint(FixAtoms([1]))
    read_back = pieces(record, Result(atoms, "step limit"), True)
    assert set(read_back) == {"xyz", "sdf"}
    back = read_one(read_back["xyz"])
    np.testing.assert_allclose(back.positions, atoms.positions, atol=1e-7)
    assert back.get_potential_energy() == Result(atoms).energy and back.constraints[
        0
    ].index.tolist() == [1]
    assert (
        back.info["smiles"] == "C/C=C\\C"
        and back.info["status"] == "step limit"
        and back.info["charge"] == 0
    )
    assert set(pieces(record, Result(atoms), False)) == {"xyz"}


def test_mol_block_of_a_relaxation():
    from rdkit import Chem

    record = record_of("C/C=C\\CC(=O)[O-]", "a\nname")
    atoms = moved(record, 0.02)
    data = pieces(record, Result(atoms), True)["sdf"].decode()
    supplier = Chem.SDMolSupplier()
    supplier.SetData(data + data, removeHs=False)
    first, second = supplier
    np.testing.assert_allclose(first.GetConformer().GetPositions(), atoms.positions, atol=1e-4)
    assert Chem.MolToSmiles(Chem.RemoveHs(second)) == Chem.CanonSmiles("C/C=C\\CC(=O)[O-]")
    assert first.GetProp("_Name") == "a name" and Chem.GetFormalCharge(first) == -1
    assert (
        float(first.GetProp("energy_ev")) == Result(atoms).energy and first.GetIntProp("index") == 3
    )


def test_no_pieces_without_a_geometry():
    record = record_of("C")
    assert (
        pieces(record, Result(record.atoms, "failed", "atoms 1 and 2 are 0.1 Å apart"), True) == {}
    )
    nowhere = record.atoms.copy()
    nowhere.positions[2] = np.nan
    assert pieces(record, Result(nowhere, "diverged"), True) == {}
    far = record.atoms.copy()
    far.positions[2] = 1e5
    assert set(pieces(record, Result(far, "diverged"), True)) == {"xyz"}
    unknown = MoleculeRecord(0, "", "", molecule("H2O", info={"charge": 0.0}), "", "as given")
    assert set(pieces(unknown, Result(unknown.atoms), True)) == {"xyz"}


def test_trajectory():
    record = record_of("C[NH3+]")
    frames = [moved(record, by) for by in (0.2, 0.1)]
    for i, atoms in enumerate(frames):
        atoms.calc = SinglePointCalculator(
            atoms, energy=-float(i), forces=np.full((len(atoms), 3), i / 7)
        )
    data = pieces(record, Result(frames[-1], frames=frames), False)["trajectory.xyz"]
    back = read(io.StringIO(data.decode()), ":", format="extxyz")
    assert [a.info["frame"] for a in back] == [0, 1] and [
        a.get_potential_energy() for a in back
    ] == [0, -1]
    assert all(a.info["charge"] == 1 and a.info["index"] == 3 for a in back)
    np.testing.assert_allclose(back[0].positions, frames[0].positions, atol=1e-7)
    np.testing.assert_allclose(back[1].get_forces(), 1 / 7, atol=1e-7)


def test_cells():
    record = record_of("C[NH3+]")
    cells = dict(zip(COLUMNS, result_cells(record, Result(moved(record))), strict=True))
    assert (
        cells["n_atoms"] == 8
        and cells["charge"] == 1
        and cells["geometry"] == "embedded"
        and cells["index"] == 3
    )
    assert 0.01 < cells["rmsd_ang"] < 0.2
    failed = dict(
        zip(COLUMNS, result_cells(record, Result(record.atoms, "failed", "why")), strict=True)
    )
    assert math.isnan(failed["rmsd_ang"]) and failed["reason"] == "why"


def test_relaxed_cells():
    """Volumes, pressure and stress; the RMSD does not count the change of the cell."""
    start = Atoms("NaCl", [[0, 0, 0], [2.0, 2, 2]], cell=[4.0, 4, 4], pbc=True)
    end = start.copy()
    end.set_cell([5.0, 4, 4], scale_atoms=True)
    stress = np.arange(6) / 10
    end.calc = SinglePointCalculator(end, energy=-1.0, forces=np.zeros((2, 3)), stress=stress)
    start.info["charge"] = 0.0
    record = dataclasses.replace(record_of("C"), atoms=start, bonds=None)
    result = Result(end, cell_start=start.cell.array, pressure=-3.0)
    cells = dict(zip(CELL_LAYOUT.columns, result_cells(record, result, CELL_LAYOUT), strict=True))
    assert cells["volume_start_ang3"] == pytest.approx(64) and cells["rmsd_ang"] < 1e-12
    assert cells["volume_ang3"] == pytest.approx(80) and cells["pressure_gpa"] == -3.0
    assert len(failure_cells(record, CELL_LAYOUT)) == len(CELL_LAYOUT.columns)
    back = read_one(pieces(record, result, False)["xyz"])
    np.testing.assert_allclose(back.get_stress(), stress, atol=1e-7)
    assert back.cell.volume == pytest.approx(80)


def test_rmsd():
    start = molecule("CH3CH2OH")
    turned = start.copy()
    turned.positions = Rotation.from_euler("xyz", [1, 2, 3]).apply(start.positions) + [5, -2, 1]
    assert rmsd(start, turned) < 1e-12
    mirrored = start.copy()
    mirrored.positions[:, 0] *= -1
    chiral = Atoms("CHFClBr", [[0, 0, 0], [1, 0, 0], [0, 1.3, 0], [0, 0, 1.7], [-1, -1, -1]])
    other = chiral.copy()
    other.positions[:, 0] *= -1
    assert rmsd(chiral, other) > 0.3  # a mirror image is another molecule
    shifted = start.copy()
    shifted.positions[0] += [0.3, 0, 0]
    plain = np.sqrt(
        (
            (
                shifted.positions
                - shifted.positions.mean(0)
                - start.positions
                + start.positions.mean(0)
            )
            ** 2
        )
        .sum(1)
        .mean()
    )
    assert 0 < rmsd(start, shifted) <= plain
    periodic = start.copy()
    periodic.cell, periodic.pbc = [9, 9, 9], True
    assert rmsd(periodic, shifted) == pytest.approx(plain)
    assert rmsd(Atoms("H", [[0, 0, 0]]), Atoms("H", [[1, 2, 3]])) == 0
    shifted.positions[0] = np.nan
    assert math.isnan(rmsd(start, shifted))
