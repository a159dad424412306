"""Tests for splits and training subsets as set in config.data."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from rdkit import Chem
from rdkit.DataStructs import TanimotoSimilarity

from mlip_jax.datasets import readers, source
from mlip_jax.datasets.molecules.fingerprints import morgan_fingerprint
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import data_split
from mlip_jax.datasets.selection.scaffolds import murcko_scaffold

DATA = Path(__file__).parents[2] / "data/gfn2_small.hdf5"
CONFORMERS = 6  # of every molecule of DATA
RECORDS = {"train": [0, 3, 4, 5, 6, 7, 8], "valid": [9, 16], "test": [2, 1]}


def structures():
    with readers.open_data(DATA) as opened:
        return list(opened)


def check_parts(parts, loaded):
    assert set(parts) == {"train", "valid", "test"}
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together) and np.isin(together, loaded.indices).all()


def labels_of(parts, values):
    return [set(np.asarray(values)[parts[name]].tolist()) for name in ("train", "valid", "test")]


def disjoint(sets):
    return all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


@pytest.mark.parametrize("by", ["random", "molecule", "size", "scaffold", "scaffold_random"])
def test_every_split_method(options, shared_store, by):
    if by.startswith("scaffold"):
        pytest.importorskip("rdkit")
    # A filter, so that numbers in the store are not places in the selection.
    data = options(
        shared_store, charge=0.0, min_atoms=7, split=by, num_train=60, num_valid=12, num_test=12
    )
    loaded = source.load(data)
    parts = data_split.split_data(loaded, data)
    check_parts(parts, loaded)
    assert len(loaded.indices) < 102 and all(len(p) for p in parts.values())
    all_structures = structures()
    molecules = labels_of(parts, [s.molecule for s in all_structures])
    if by == "random":
        assert molecules[0] & molecules[2]
        assert [len(parts[n]) for n in parts] == [60, 12, 12]
    else:
        assert disjoint(molecules)
    if by == "size":
        sizes = labels_of(parts, [len(s) for s in all_structures])
        assert max(sizes[0]) < min(sizes[1]) and max(sizes[1]) < min(sizes[2])
    if by.startswith("scaffold"):
        assert disjoint(labels_of(parts, [murcko_scaffold(s.smiles) for s in all_structures]))
    again = data_split.split_data(loaded, data)
    assert all(np.array_equal(again[n], parts[n]) for n in parts)


@pytest.mark.parametrize("by", ["random", "molecule"])
def test_other_seed_gives_another_split(options, shared_store, by):
    parts = [
        data_split.split_data(source.load(data), data)
        for data in (
            options(
                shared_store, split=by, split_seed=seed, num_train=60, num_valid=12, num_test=12
            )
            for seed in (0, 1)
        )
    ]
    assert not np.array_equal(parts[0]["test"], parts[1]["test"])


def test_split_files_by_record(options, shared_store, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(RECORDS))
    for name, records in RECORDS.items():
        (tmp_path / f"index_{name}.csv").write_text("".join(f"{r}\n" for r in records))
    texts = ",".join(str(tmp_path / f"index_{name}.csv") for name in RECORDS)
    named = ",".join(f"{name}={tmp_path}/index_{name}.csv" for name in RECORDS)
    record = np.array([s.record for s in structures()])
    neutral = np.array([s.charge == 0 for s in structures()])
    for files in (str(tmp_path / "split.json"), texts, named):
        data = options(shared_store, charge=0.0, split_files=files)
        loaded = source.load(data)
        parts = data_split.split_data(loaded, data)
        check_parts(parts, loaded)
        for name, records in RECORDS.items():
            np.testing.assert_array_equal(
                parts[name], np.flatnonzero(np.isin(record, records) & neutral)
            )
        assert len(parts["test"]) == CONFORMERS, "acetate, record 2, is charged"


def test_split_file_of_another_data_set_is_rejected(options, shared_store, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 1], "test": [17]}))
    data = options(shared_store, split_files=str(tmp_path / "split.json"))
    with pytest.raises(DatasetError, match="beyond the last record 16"):
        data_split.split_data(source.load(data), data)


def test_missing_official_split_is_rejected(options, shared_store):
    data = options(shared_store, split="official")
    with pytest.raises(ValueError, match="no official split.*data.split_files"):
        data_split.split_data(source.load(data), data)


def test_scaffold_split_requires_smiles(options, tmp_path):
    path = Path(shutil.copy(DATA, tmp_path / "bare.hdf5"))
    with h5py.File(path, "a") as file:
        for group in file.values():
            del group["smiles"]
    data = options(path, split="scaffold")
    with pytest.raises(DatasetError, match="requires SMILES.*Choose another data.split"):
        data_split.split_data(source.load(data), data)


def test_training_subsets_are_nested(options):
    def parts(**fields):
        data = options(DATA, num_train=80, num_valid=10, num_test=10, min_conformers=5, **fields)
        loaded = source.load(data)
        return loaded.store, data_split.split_data(loaded, data)

    store, whole = parts()
    _, large = parts(num_molecules=6, num_conformers=5)
    _, small = parts(num_molecules=3, num_conformers=2)
    assert len(large["train"]) == 30 and len(small["train"]) == 6
    assert set(small["train"]) < set(large["train"]) < set(whole["train"])
    assert len(np.unique(store.index("molecule")[small["train"]])) == 3
    for name in ("valid", "test"):
        np.testing.assert_array_equal(small[name], whole[name])


def test_molecules_with_few_conformers_are_drawn_last(options):
    def train(**fields):
        data = options(
            DATA,
            num_train=80,
            num_valid=10,
            num_test=10,
            num_molecules=6,
            num_conformers=2,
            **fields,
        )
        loaded = source.load(data)
        return data_split.split_data(loaded, data)["train"]

    more = CONFORMERS + 1
    with pytest.raises(ValueError, match=f"6 molecules with at least {more} conformations; 0 of"):
        train(min_conformers=more)
    actual = train(min_conformers=more, below_min_conformers="last")
    assert len(actual) == 12 and np.array_equal(actual, train())
    with pytest.raises(ValueError, match="unknown data.below_min_conformers 'first'"):
        train(below_min_conformers="first")
    with pytest.raises(ValueError, match="requires data.selection='random'"):
        train(below_min_conformers="last", selection="maxmin")


def test_diverse_training_molecules_by_fingerprints(options, tmp_path):
    def molecules(**fields):
        data = options(
            DATA,
            num_train=80,
            num_valid=10,
            num_test=10,
            min_conformers=2,
            num_conformers=2,
            **fields,
        )
        loaded = source.load(data)
        train = data_split.split_data(loaded, data)["train"]
        codes, smiles = loaded.store.texts("smiles")
        return {smiles[c] for c in codes[train]}, len(train)

    few, size = molecules(num_molecules=3, selection="maxmin")
    more, _ = molecules(num_molecules=6, selection="maxmin")
    drawn, _ = molecules(num_molecules=6)
    assert len(few) == 3 and size == 6 and few < more and len(more) == 6 and more != drawn

    def nearest(names):
        prints = [
            morgan_fingerprint(Chem.RemoveHs(Chem.MolFromSmiles(name))) for name in sorted(names)
        ]
        return max(TanimotoSimilarity(a, b) for i, a in enumerate(prints) for b in prints[:i])

    assert nearest(more) < nearest(drawn)
    with pytest.raises(ValueError, match="data.selection 'maxmim'.*Did you mean 'maxmin'"):
        molecules(num_molecules=3, selection="maxmim")


def test_diverse_training_molecules_by_features(options):
    """Subsets are nested, use first conformers, and do not depend on the split."""
    requested = []

    def embed(store, indices):
        assert (np.asarray(store.index("conformer")[indices]) == 0).all()
        requested.append(indices)
        return np.array([[store[i].numbers.mean(), len(store[i])] for i in indices])

    def molecules(**fields):
        data = options(
            DATA,
            num_train=80,
            num_valid=10,
            num_test=10,
            min_conformers=2,
            num_conformers=2,
            selection="embedding",
            **fields,
        )
        loaded = source.load(data)
        train = data_split.split_data(loaded, data, embed)["train"]
        assert len(train) == 2 * fields["num_molecules"]
        return set(np.asarray(loaded.store.index("molecule")[train]).tolist())

    small, large = molecules(num_molecules=3), molecules(num_molecules=6)
    other = molecules(num_molecules=6, split_seed=1)
    assert small < large != other and all(np.array_equal(a, requested[0]) for a in requested)
    data = options(
        DATA, num_train=80, num_valid=10, num_test=10, num_molecules=3, selection="embedding"
    )
    with pytest.raises(ValueError, match="data.selection='embedding' requires the features"):
        data_split.split_data(source.load(data), data)
