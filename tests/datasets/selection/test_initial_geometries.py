"""Tests for initial geometries: sources, excluded molecules with reasons, and unseen molecules."""

import dataclasses
import json

import numpy as np
import pytest
from ase.build import molecule
from ase.io import write

from mlip_jax.datasets.molecules.connectivity import from_smiles, skeleton
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import initial_geometries
from mlip_jax.datasets.selection.geometry_pools import (
    PERIODIC,
    FilePool,
    InitialGeometry,
    SmilesPool,
    StorePool,
)
from mlip_jax.datasets.selection.held_out import RunData, first_per_molecule
from mlip_jax.datasets.selection.initial_geometries import SEEN, MoleculeSelection, choose
from mlip_jax.datasets.selection.split_files import save_split
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store

HCNO = frozenset({1, 6, 7, 8})
NAMES = {
    "ethanol": ("CH3CH2OH", "CCO"),
    "methane": ("CH4", "C"),
    "amine": ("H3CNH2", "CN"),
    "water": ("H2O", "O"),
    "thiol": ("CH3SH", "CS"),
}


def trajectories(path, smiles=True):
    """Write extended XYZ: per molecule three frames of stage a and three of b; water has no b."""
    frames = []
    for name, (of_ase, text) in NAMES.items():
        for stage in "ab" if name != "water" else "a":
            for step in range(3):
                atoms = molecule(of_ase)
                atoms.rattle(0.05 / (1 + step), seed=step)
                atoms.info = {
                    "molecule": name,
                    "config_type": stage,
                    **({"smiles": text} if smiles else {}),
                }
                frames.append(atoms)
    write(path, frames, format="extxyz")
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores with and without SMILES."""
    folder = tmp_path_factory.mktemp("stores")
    stores_by_smiles = {}
    for smiles in (True, False):
        file = trajectories(folder / f"{smiles}.xyz", smiles)
        options = {"molecule_key": "molecule", "energy_key": "", "forces_key": ""}
        convert(
            ConversionSpec(str(file), "ase", options, filters={"require": "none"}, dtype="float64"),
            folder / str(smiles),
            reject_invalid=False,
            num_processes=1,
            progress=False,
        )
        stores_by_smiles[smiles] = Store(folder / str(smiles))
    return stores_by_smiles


def everything(store):
    return np.arange(len(store))


def structure_of(store, name, stage, step):
    actual = [
        s for s in (store[i] for i in range(len(store))) if (s.molecule, s.subset) == (name, stage)
    ]
    return sorted(actual, key=lambda s: (s.record, s.conformer))[step]


def test_initial_geometries_are_first_and_references_last_snapshots(stores):
    store = stores[True]
    pool = StorePool(store, everything(store), "a", "b")
    assert sorted(pool.names()) == sorted(set(NAMES) - {"water"})
    starts, problems = pool.make(range(len(pool)))
    assert not problems
    for s in starts:
        np.testing.assert_array_equal(
            s.atoms.positions, structure_of(store, s.name, "a", 0).positions
        )
        np.testing.assert_array_equal(s.reference, structure_of(store, s.name, "b", 2).positions)
    of_b, _ = StorePool(store, everything(store), "b").make([0])
    np.testing.assert_array_equal(
        of_b[0].atoms.positions, structure_of(store, of_b[0].name, "b", 0).positions
    )
    assert of_b[0].reference is None
    with pytest.raises(DatasetError, match="unknown stage .* 'c'"):
        StorePool(store, everything(store), "c")
    with pytest.raises(DatasetError, match="no molecule has an initial snapshot"):
        StorePool(store, everything(store)[:0])


def test_initial_geometry_round_trip_is_exact(stores):
    for start in StorePool(stores[True], everything(stores[True]), "a", "b").make(range(4))[0]:
        again = InitialGeometry.from_json(json.loads(json.dumps(start.to_json())))
        assert (again.name, again.smiles, again.seen) == (start.name, start.smiles, start.seen)
        np.testing.assert_array_equal(again.atoms.positions, start.atoms.positions)
        np.testing.assert_array_equal(again.reference, start.reference)
        assert again.atoms.info == start.atoms.info


@pytest.mark.parametrize("smiles", [True, False])
def test_excluded_molecules_have_a_reason(stores, smiles):
    store = stores[smiles]
    seen = frozenset(skeleton(from_smiles(s)) for s in ("CCO", "CS"))  # methanethiol has S
    choice = MoleculeSelection(10, elements=HCNO, seen=seen)
    starts, left_out = choose(StorePool(store, everything(store)), choice)
    assert {s.name for s in starts} == {"methane", "amine", "water"}
    assert left_out == {"ethanol": SEEN, "thiol": "a force field does not support S"}
    allowed, left_out = choose(
        StorePool(store, everything(store)), dataclasses.replace(choice, allow_seen=True)
    )
    assert {s.name: s.seen for s in allowed} == {
        "methane": False,
        "amine": False,
        "water": False,
        "ethanol": True,
    }
    with pytest.raises(
        DatasetError, match="none of 5 .* 4 × it is in the training .* 1 × .* not support S"
    ):
        choose(
            StorePool(store, everything(store)),
            dataclasses.replace(
                choice,
                seen=frozenset(
                    skeleton(from_smiles(text)) for _, text in NAMES.values() if text != "CS"
                ),
            ),
        )


def test_selections(stores):
    pool = StorePool(stores[True], everything(stores[True]))
    elements = HCNO | {16}
    picked, _ = choose(pool, MoleculeSelection(3, first="amine", elements=elements))
    assert len(picked) == 3 and picked[0].name == "amine"
    assert [
        s.name for s in choose(pool, MoleculeSelection(2, "all", elements=elements))[0]
    ] == pool.names()
    drawn = {
        tuple(
            s.name
            for s in choose(pool, MoleculeSelection(2, "random", seed=s, elements=elements))[0]
        )
        for s in range(8)
    }
    assert len(drawn) > 2 and all(len(set(names)) == 2 for names in drawn)
    with pytest.raises(DatasetError, match="Did you mean 'amine'"):
        choose(pool, MoleculeSelection(3, first="amin", elements=elements))
    with pytest.raises(ValueError, match="selection"):
        MoleculeSelection(3, "maxmim")
    with pytest.raises(ValueError, match="num_molecules"):
        MoleculeSelection(0)


def test_smiles_are_embedded_and_failures_reported(tmp_path):
    path = tmp_path / "molecules.smi"
    path.write_text("CCO ethanol\nCCO again\nnonsense bad\nC[NH3+]\nO water\nS water\n")
    pool = SmilesPool(path)
    assert pool.names() == [
        "ethanol",
        "bad",
        "(molecules.smi line 4)",
        "water (molecules.smi line 5)",
        "water (molecules.smi line 6)",
    ]
    starts, left_out = choose(pool, MoleculeSelection(5, "all", elements=HCNO))
    assert [s.name for s in starts] == [pool.names()[0], *pool.names()[2:4]]
    assert left_out == {
        "bad": "RDKit cannot read it",
        pool.names()[4]: "a force field does not support S",
    }
    assert starts[1].atoms.info["charge"] == 1 and len(starts[1].atoms) == 8
    np.testing.assert_array_equal(
        starts[0].atoms.positions, SmilesPool(path).make([0])[0][0].atoms.positions
    )
    other = SmilesPool(path, seed=1).make([0])[0][0].atoms.positions
    assert not np.allclose(other, starts[0].atoms.positions)
    _, problems = pool.make([1])
    assert "nonsense" in problems["bad"]
    (tmp_path / "empty.smi").write_text("\n")
    with pytest.raises(DatasetError, match="no molecule"):
        SmilesPool(tmp_path / "empty.smi")


def test_each_geometry_of_a_file_is_used(tmp_path):
    frames = [
        molecule("CH3CH2OH"),
        molecule("CH3OCH3"),
        molecule("H2O", vacuum=3.0, pbc=True),
        molecule("CH3SH"),
    ]
    frames[0].info = {"name": "alcohol", "charge": 0}
    frames[1].info = {"name": "ether"}
    write(tmp_path / "f.xyz", frames, format="extxyz")
    with open(tmp_path / "f.xyz", "a") as file:
        file.write("3\ncut off\nO 0 0 0\n")
    starts, left_out = choose(
        FilePool(tmp_path / "f.xyz"), MoleculeSelection(9, "all", elements=HCNO)
    )
    assert [s.name for s in starts] == ["alcohol", "ether"]  # isomers are two molecules
    np.testing.assert_allclose(starts[1].atoms.positions, frames[1].positions, atol=1e-7)
    assert left_out["(f.xyz molecule 2)"] == PERIODIC
    assert left_out["(f.xyz molecule 3)"] == "a force field does not support S"
    assert "RDKit" in left_out["(f.xyz molecule 4)"] or "atoms" in left_out["(f.xyz molecule 4)"]


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"vacuum": 3.0, "pbc": True}, PERIODIC),
        ({"info": {"charge": float("inf")}}, "its charge is inf"),
    ],
)
def test_unusable_structures_of_a_store_are_reported(tmp_path, options, problem):
    write(tmp_path / "p.xyz", molecule("H2O", **options), format="extxyz")
    convert(
        ConversionSpec(
            str(tmp_path / "p.xyz"),
            "ase",
            {"energy_key": "", "forces_key": ""},
            filters={"require": "none"},
        ),
        tmp_path / "store",
        reject_invalid=False,
        num_processes=1,
        progress=False,
    )
    starts, problems = StorePool(Store(tmp_path / "store"), np.arange(1)).make([0])
    assert not starts and list(problems.values()) == [problem]


def test_molecules_only_in_the_test_split(stores, tmp_path):
    store = stores[True]
    molecules = np.array([store[i].molecule for i in range(len(store))])
    where = {name: np.flatnonzero(molecules == name) for name in NAMES}
    parts = {
        "train": np.concatenate([where["ethanol"], where["methane"][:2]]),
        "valid": where["amine"],
        "test": np.sort(np.concatenate([where["water"][:2], where["methane"][2:], where["thiol"]])),
    }
    save_split(tmp_path / "splits.npz", parts, {"store": str(store.path)})
    run = RunData.load(f"{tmp_path}#dispersion=pbe#k_vectors=2000")
    assert run.workdir == tmp_path  # the training molecules used to be unknown, and evaluated
    assert set(molecules[run.held_out()]) == {"water", "thiol"}
    assert set(where["water"]) <= set(
        run.held_out().tolist()
    )  # all its structures, for it may start in any
    actual, unread = run.seen_skeletons()
    assert actual == {skeleton(from_smiles(s)) for s in ("CCO", "C", "CN")} and unread == 0
    assert len(first_per_molecule(store, run.seen())) == 3
    assert len(first_per_molecule(store, everything(store)[:0])) == 0
    save_split(tmp_path / "splits.npz", parts, {"store": str(tmp_path / "gone")})
    with pytest.raises(DatasetError, match="gone"):
        RunData.load(tmp_path)
    assert initial_geometries.SELECTIONS == ("maxmin", "random", "all")
