"""Tests for edge counts of a store: equal to brute force, cached, recounted if invalid."""

import logging
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store
from mlip_jax.graphs import edge_counts as module
from mlip_jax.graphs.edge_counts import count_all, count_all_pairs, edge_counts, pair_counts

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
CUTOFF = 2.6

PERIODIC = """\
2
Properties=species:S:1:pos:R:3 energy=-1.0 pbc="T T T" Lattice="4.2 0 0 0 4.2 0 0 0 4.2"
Na 0.0 0.0 0.0
Cl 2.1 0.0 0.0
3
Properties=species:S:1:pos:R:3 energy=-2.0 pbc="F F F"
O 0.0 0.0 0.0
H 0.0 0.0 0.96
H 0.0 0.93 -0.24
1
Properties=species:S:1:pos:R:3 energy=-3.0 pbc="F F F"
He 0.0 0.0 0.0
"""


@pytest.fixture(scope="module")
def original_store(tmp_path_factory):
    """Store with many shards."""
    folder = convert(
        ConversionSpec(str(DATA), atoms_per_shard=60),
        tmp_path_factory.mktemp("original_store") / "store",
        num_processes=1,
        progress=False,
    )
    assert len(Store(folder).manifest["shards"]) > 10
    return folder


@pytest.fixture
def store(original_store, tmp_path):
    """Copy of the store, which a test may change."""
    return Store(shutil.copytree(original_store, tmp_path / "store"))


def brute_force(store, cutoff):
    counts = []
    for s in range(len(store)):
        x = store[s].positions
        d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
        counts.append(int((d < cutoff).sum()) - len(x))
    return np.array(counts)


def count(store, cutoff=CUTOFF, **options):
    return edge_counts(store, cutoff, progress=False, **options)


def forbid(*_):
    raise AssertionError("counted again")


@pytest.mark.parametrize("cutoff", [0.5, 2.6, 5.0, 100.0])
def test_counts_equal_those_of_brute_force(store, cutoff):
    expected = brute_force(store, cutoff)
    np.testing.assert_array_equal(count(store, cutoff), expected)
    np.testing.assert_array_equal(count_all(store.take(np.arange(len(store))), cutoff), expected)
    assert count(store, cutoff).dtype == np.int32


def test_periodic_structures_among_others(tmp_path):
    (tmp_path / "frames.xyz").write_text(PERIODIC)
    store = Store(
        convert(
            ConversionSpec(str(tmp_path / "frames.xyz")),
            tmp_path / "store",
            num_processes=1,
            reject_invalid=False,
            progress=False,
        )
    )
    # Each ion sees the other at 2.1 Å on both sides, and its own six images at 4.2 Å.
    assert count(store, 2.5).tolist() == [4, 6, 0]
    assert count(store, 4.3)[0] == 2 * (2 + 6)
    assert count(store, 1.0).tolist() == [0, 4, 0]


def test_counts_are_read_the_second_time(store, monkeypatch):
    first = np.array(count(store))
    monkeypatch.setattr(module, "count_edges", forbid)
    again = count(Store(store.path))
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(again, first)
    assert not list(store.path.rglob("*.tmp"))


def test_another_cutoff_is_another_file(store):
    close = CUTOFF + 1e-7
    counts = {cutoff: np.array(count(store, cutoff)) for cutoff in (CUTOFF, close, 5.0)}
    assert len(list((store.path / "edges").iterdir())) == 3
    for cutoff, expected in counts.items():
        np.testing.assert_array_equal(count(store, cutoff), expected)
    assert (counts[5.0] > counts[CUTOFF]).any()


def test_other_structures_in_the_same_folder_are_recounted(store, tmp_path):
    before = np.array(count(store))
    changed = tmp_path / "changed.hdf5"
    shutil.copy(DATA, changed)
    with h5py.File(changed, "a") as file:
        group = next(iter(file.values()))
        group["conformations"][0] = 3 * group["conformations"][0]
    other = convert(
        ConversionSpec(str(changed), atoms_per_shard=60),
        tmp_path / "other",
        num_processes=1,
        reject_invalid=False,
        progress=False,
    )
    shutil.copytree(store.path / "edges", other / "edges")
    after = count(Store(other))
    np.testing.assert_array_equal(after, brute_force(Store(other), CUTOFF))
    assert after[0] < before[0] and (after[1:] == before[1:]).all()


def test_filtered_stores_of_the_same_shards_have_their_own_counts(tmp_path):
    """Outliers are excluded by the index only: one by its energy here, one by its forces there."""
    changed = tmp_path / "changed.hdf5"
    shutil.copy(DATA, changed)
    with h5py.File(changed, "a") as file:
        names = list(file)
        file[names[0]]["dft_total_energy"][2] += 3.0
        file[names[5]]["dft_total_gradient"][1] *= 50
    plain, energy, force = (
        Store(
            convert(
                ConversionSpec(str(changed), filters=filters, atoms_per_shard=60),
                tmp_path / name,
                num_processes=1,
                reject_invalid=False,
                progress=False,
            )
        )
        for name, filters in (
            ("plain", {}),
            ("energy", {"max_energy_z": 20.0}),
            ("force", {"max_force_z": 20.0}),
        )
    )
    assert plain.manifest["shards"] == energy.manifest["shards"] == force.manifest["shards"]
    assert len(energy) == len(force) == len(plain) - 1
    everything = np.array(count(plain))
    np.testing.assert_array_equal(count(energy), np.delete(everything, 2))
    for edges in (plain, energy):
        shutil.copytree(edges.path / "edges", force.path / "edges", dirs_exist_ok=True)
    np.testing.assert_array_equal(count(force), np.delete(everything, 5 * 6 + 1))
    assert np.delete(everything, 2).tolist() != np.delete(everything, 5 * 6 + 1).tolist()


def test_counts_that_cannot_be_stored_are_correct_and_logged(store, caplog):
    expected = brute_force(store, CUTOFF)
    (store.path / "edges").write_text("a file where the folder should be")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(count(store), expected)
        assert "cannot save" in caplog.text and str(store.path) in caplog.text


def test_full_disk_leaves_nothing_behind(store, caplog, monkeypatch):
    def half(file, array):
        file.write(b"\x93NUMPY" + bytes(20))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", half)
        np.testing.assert_array_equal(count(store), brute_force(store, CUTOFF))
    assert "No space left" in caplog.text
    assert list((store.path / "edges").iterdir()) == []
    np.testing.assert_array_equal(count(store), brute_force(store, CUTOFF))
    assert len(list((store.path / "edges").iterdir())) == 1


def corruptions(store):
    """Functions by name that corrupt the bytes of the file of counts."""

    def as_file(array):
        def write(path):
            with open(path, "wb") as file:
                np.save(file, array, allow_pickle=True)

        return write

    n = len(store)
    return {
        "empty": lambda path: path.write_bytes(b""),
        "header cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
        "values cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
        "other bytes": lambda path: path.write_bytes(b"<html>not found</html>" * 20),
        "fewer": as_file(np.zeros(n - 1, np.int32)),
        "other type": as_file(np.zeros(n, np.float64)),
        "pickle": as_file(np.array([None] * n)),
    }


@pytest.mark.parametrize(
    "damage", ["empty", "header cut", "values cut", "other bytes", "fewer", "other type", "pickle"]
)
def test_a_corrupted_file_is_rebuilt(store, caplog, damage, monkeypatch):
    expected = np.array(count(store))
    (path,) = (store.path / "edges").iterdir()
    sound = path.read_bytes()
    corruptions(store)[damage](path)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(count(store), expected)
    assert str(path) in caplog.text and "damaged" in caplog.text
    assert path.read_bytes() == sound
    monkeypatch.setattr(module, "count_edges", forbid)
    np.testing.assert_array_equal(count(store), expected)


def test_several_processes_count_the_same(store, monkeypatch):
    expected = brute_force(store, CUTOFF)
    monkeypatch.setattr(module, "_PER_JOB", 25)
    np.testing.assert_array_equal(count(store, num_processes=1), expected)
    shutil.rmtree(store.path / "edges")
    monkeypatch.setattr(module, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(module, "count_all", forbid)  # in this process; the others inherit it
    np.testing.assert_array_equal(count(store, num_processes=2), expected)


def test_pairs_are_half_of_the_edges_and_stored_with_them(store):
    pairs = pair_counts(store, 5.0, progress=False)
    np.testing.assert_array_equal(2 * pairs, brute_force(store, 5.0))
    np.testing.assert_array_equal(count_all_pairs(store.take(np.arange(len(store))), 5.0), pairs)
    assert len(list((store.path / "edges").iterdir())) == 1


def test_all_pairs_are_counted_without_positions(store, monkeypatch):
    monkeypatch.setattr(module, "count_edges", forbid)
    n = np.array(store.index("n_atoms"), np.int64)
    np.testing.assert_array_equal(pair_counts(store, np.inf), n * (n - 1) // 2)
    np.testing.assert_array_equal(
        count_all_pairs(store.take(np.arange(len(store))), np.inf), n * (n - 1) // 2
    )


def test_all_pairs_of_a_store_with_periodic_structures_are_rejected(tmp_path):
    (tmp_path / "frames.xyz").write_text(PERIODIC)
    store = Store(
        convert(
            ConversionSpec(str(tmp_path / "frames.xyz")),
            tmp_path / "store",
            num_processes=1,
            reject_invalid=False,
            progress=False,
        )
    )
    with pytest.raises(ValueError, match="store.*infinitely many pairs"):
        pair_counts(store, np.inf)
    assert pair_counts(store, 4.3, progress=False).tolist() == [8, 3, 0]
