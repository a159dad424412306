"""Tests for the store: equal to its source, in any order, from any number of shards."""

import collections
import gc
import json
import os
import pickle
import shutil
import time
import weakref
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.identity import stable_ids
from mlip_jax.datasets.quality import geometry
from mlip_jax.datasets.quality.filters import force_rms_per_structure
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store import conversion, shards, store
from mlip_jax.datasets.store.conversion import ConversionSpec
from mlip_jax.datasets.store.store import INDEX, Store, is_store

MOLECULES = Path(__file__).parents[2] / "data" / "gfn2_small.hdf5"
LABELS = (
    "numbers",
    "positions",
    "forces",
    "energy",
    "charge",
    "cell",
    "pbc",
    "conformer",
    "record",
)
DEVIATION = 0.02  # eV/atom, of the median of the molecule: leaves some of most molecules


def mixed_file(path):
    """Write extended XYZ with varying labels and periodicity, so that shards differ in columns."""
    rng = np.random.default_rng(5)
    lines = []
    for s in range(40):
        n, forces, periodic = int(rng.integers(2, 9)), s % 10 < 6, 10 <= s < 25
        label = f"energy={-100 * n - rng.random()}" if s % 7 else "charge=1"
        text = f'molecule=m{s % 4} smiles={"C" * (s % 4) or "O"} config_type="part {s // 20}" '
        text += 'dipole="{} {} {}"'.format(*rng.normal(size=3)) if s % 3 else "gap=0.25"
        cell = f'pbc="T T F" Lattice="{6 + s / 10} 0 0 0 9 0 0 0 8"' if periodic else 'pbc="F F F"'
        columns = "species:S:1:pos:R:3:q:R:1" + (":forces:R:3" if forces else "")
        lines += [str(n), f"Properties={columns} {label} {text} {cell}"]
        for a in range(n):
            values = [
                *(rng.random(3) * 0.2 + np.array([a % 2, a // 2 % 2, a // 4]) * 1.5),
                rng.normal(),
            ]
            lines.append(
                " ".join(
                    [
                        ("H", "C", "N", "O")[a % 4],
                        *map(repr, map(float, values)),
                        *map(repr, rng.normal(size=3).tolist() if forces else []),
                    ]
                )
            )
    path.write_text("\n".join(lines) + "\n")
    return path


def specs(folder):
    options = {
        "molecule_key": "molecule",
        "property_keys": ["dipole", "gap"],
        "atom_property_keys": ["q"],
    }
    mixed = str(mixed_file(folder / "mixed.xyz"))
    return {
        "molecules": ConversionSpec(str(MOLECULES), atoms_per_shard=60),
        "mixed": ConversionSpec(mixed, "ase", options, atoms_per_shard=12, dtype="float64"),
        "one shard": ConversionSpec(mixed, "ase", options),
        "with holes": ConversionSpec(
            str(MOLECULES),
            atoms_per_shard=60,
            filters={"require": "none", "max_energy_deviation": DEVIATION},
        ),
        "no charged ones": ConversionSpec(
            str(MOLECULES),
            atoms_per_shard=60,
            filters={"charge": 0.0, "require": "any", "max_atoms": 9},
        ),
    }


def expected_of(spec) -> list:
    """Return the structures that the store must contain, read from the source one by one."""
    with spec.open() as source:
        structures = list(source)
    if "charge" in spec.filters:
        structures = [s for s in structures if s.charge == 0 and len(s) <= 9]
    if "max_energy_deviation" in spec.filters:
        median = {
            m: np.median([s.energy for s in structures if s.molecule == m])
            for m in {s.molecule for s in structures}
        }
        structures = [
            s for s in structures if abs(s.energy - median[s.molecule]) <= DEVIATION * len(s)
        ]
    return structures


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores by name: (path, structures that it must contain)."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        name: (
            conversion.convert(
                spec, folder / name, num_processes=1, progress=False, reject_invalid=False
            ),
            Columns.from_structures(expected_of(spec)),
        )
        for name, spec in specs(folder).items()
    }


@pytest.fixture(params=["molecules", "mixed", "one shard", "with holes", "no charged ones"])
def case(request, stores):
    path, expected = stores[request.param]
    return Store(path), expected


@pytest.fixture
def copy(stores, tmp_path):
    """A copy of a store that a test can corrupt."""
    return Path(shutil.copytree(stores["molecules"][0], tmp_path / "store"))


def assert_same(actual: Columns, expected: Columns, names=None):
    """Compare up to float32. Columns that are NaN or zero in `expected` may be missing."""
    names = names or [*vars(expected)]
    for name in names:
        a, b = getattr(actual, name), getattr(expected, name)
        if name in ("properties", "atom_properties"):
            assert a.keys() <= b.keys()
            for key, values in b.items():
                if key in a:
                    np.testing.assert_allclose(a[key], values, rtol=1e-6, atol=1e-7, err_msg=key)
                else:
                    assert np.isnan(values).all()
        elif name in ("cell", "pbc") and (a is None or b is None):
            assert (a is None or not a.any()) and (b is None or not b.any())
        elif name in ("positions", "forces"):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_stores_cover_the_cases_of_these_tests(stores):
    counts = {name: len(Store(path).manifest["shards"]) for name, (path, _) in stores.items()}
    assert counts["molecules"] == 17 and counts["mixed"] > 10 and counts["one shard"] == 1
    empty = [
        s for s in Store(stores["no charged ones"][0]).manifest["shards"] if not s["structures"]
    ]
    assert empty, "expected a shard without any structure after filtering"
    columns = [
        shards.Shard(stores["mixed"][0] / "shards" / s["file"]).arrays.keys()
        for s in Store(stores["mixed"][0]).manifest["shards"]
    ]
    for name in ("cell", "forces"):
        assert 0 < sum(name in c for c in columns) < len(columns), name
    holes = Store(stores["with holes"][0])
    assert holes.manifest["filtered"] and 20 < len(holes) < 95


def test_store_equals_the_source(case):
    actual, expected = case
    assert len(actual) == len(expected)
    assert_same(actual.take(np.arange(len(actual))), expected)
    for s in (0, len(actual) // 2, len(actual) - 1):
        assert_same(Columns.from_structures([actual[s]]), expected.take([s]))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_take_in_any_order(stores, data):
    for path, expected in stores.values():
        indices = np.array(
            data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=12)), np.int64
        )
        actual = Store(path)
        assert_same(actual.take(indices), expected.take(indices))
        assert_same(actual.take(indices, labels_only=True), expected.take(indices), LABELS)


def test_labels_only_omits_texts_and_properties(case):
    actual, expected = case
    labels = actual.take(np.arange(len(actual)), labels_only=True)
    assert_same(labels, expected, LABELS)
    assert_same(labels, actual.take(np.arange(len(actual))), LABELS)
    assert not labels.properties and set(labels.molecule) == {""}


@pytest.mark.parametrize("labels_only", [False, True])
def test_arrays_do_not_depend_on_the_structures(case, labels_only):
    """Detects batches without structures, or of shards without crystals, that lack cells."""
    actual, _ = case
    for indices in ([], *np.arange(len(actual))[:, None]):
        columns = actual.take(np.array(indices, np.int64), labels_only=labels_only)
        assert (
            (columns.cell is not None) == (columns.pbc is not None) == actual.manifest["periodic"]
        )


@pytest.mark.parametrize("labels_only", [False, True])
def test_indices_out_of_range_are_rejected(case, labels_only):
    actual, _ = case
    for wrong in ([-1], [0, len(actual)]):
        with pytest.raises(IndexError, match=f"0 to {len(actual) - 1}"):
            actual.take(np.array(wrong), labels_only=labels_only)


def test_iterates_as_a_sequence(stores):
    path, expected = stores["with holes"]
    assert [(s.record, s.conformer) for s in Store(path)] == list(
        zip(expected.record, expected.conformer)
    )


@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("labels_only", [False, True])
def test_chunks(case, size, labels_only):
    actual, expected = case
    names = LABELS if labels_only else None
    seen = []
    for block, columns in actual.chunks(size=size, labels_only=labels_only):
        assert 1 <= len(block) <= size
        assert_same(columns, expected.take(block), names)
        seen.append(block)
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(len(actual)))
    order = np.random.default_rng(0).permutation(len(actual))[:11]
    parts = list(actual.chunks(order, size, labels_only=labels_only))
    np.testing.assert_array_equal(np.concatenate([block for block, _ in parts]), order)
    for block, columns in parts:
        assert_same(columns, expected.take(block), names)


def test_texts(case):
    actual, expected = case
    for name in shards.TEXTS:
        codes, texts = actual.texts(name)
        assert codes.shape == (len(actual),) and len(set(texts)) == len(texts)
        assert [texts[c] for c in codes] == getattr(expected, name).tolist()


def test_index(case):
    actual, expected = case
    biggest = [np.abs(s.forces).max() for s in expected]
    shortest = geometry.shortest_distances(expected)
    recomputed = {
        "n_atoms": expected.n_atoms,
        "energy": expected.energy,
        "charge": expected.charge,
        "molecule": stable_ids(expected.molecule),
        "record": expected.record,
        "conformer": expected.conformer,
        "max_force": biggest,
        "force_rms": force_rms_per_structure(expected),
        "shortest_distance": shortest,
        "fingerprint": geometry.fingerprints(expected),
    }
    assert recomputed.keys() == INDEX.keys()
    for name, values in recomputed.items():
        index = actual.index(name)
        assert index.dtype == INDEX[name] and index.shape == (len(actual),)
        np.testing.assert_allclose(
            index, values, rtol=0 if index.dtype.kind in "iu" else 1e-6, err_msg=name
        )
    rms = [np.sqrt((s.forces**2).mean()) for s in expected]
    np.testing.assert_allclose(actual.index("force_rms"), rms, rtol=1e-6)


def test_molecules_are_counted(case):
    actual, expected = case
    assert actual.manifest["molecules"] == len(set(expected.molecule))
    assert actual.manifest["structures"] == len(expected)


def test_store_can_be_sent_to_another_process(stores):
    """A pickled copy, as for a worker process, opens its own files."""
    path, expected = stores["mixed"]
    original = Store(path)
    original.take(np.arange(3))
    content = pickle.dumps(original)
    assert len(content) < 1000
    there = pickle.loads(content)
    assert_same(there.take(np.arange(len(there))), expected)


@pytest.mark.parametrize("labels_only", [False, True])
def test_number_of_open_shards_is_limited(stores, monkeypatch, labels_only):
    monkeypatch.setattr(store, "_OPEN_SHARDS", 3)
    path, expected = stores["molecules"]
    actual = Store(path)
    opened, kept = Counter(), weakref.WeakSet()
    original = shards.Shard.__init__

    def counted(self, path):
        opened.update([path.name])
        kept.add(self)
        original(self, path)

    monkeypatch.setattr(store.Shard, "__init__", counted)
    order = np.random.default_rng(1).permutation(len(actual))
    assert_same(actual.take(order, labels_only=labels_only), expected.take(order), LABELS)
    gc.collect()
    assert len(kept) == 3
    opened.clear()
    for record in (0, 1, 0, 2, 0, 3, 0, 4, 0):
        actual.take([np.argmax(expected.record == record)], labels_only=labels_only)
    assert opened["00000.safetensors"] <= 1 and len(opened) >= 4, (
        "the last used shard must stay open"
    )


def in_memory(path):
    """Return the resident bytes of the mappings of files under `path` in this process."""
    total, in_file = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if line.split(" ", 1)[0].count("-") == 1:
                in_file = f"{path}/shards/" in line
            elif in_file and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps"), reason="requires /proc, which lists memory maps"
)
@pytest.mark.parametrize("labels_only", [False, True])
def test_reading_does_not_accumulate_memory(stores, labels_only):
    path, expected = stores["molecules"]
    actual = Store(path)
    for order in (np.arange(len(expected)), np.random.default_rng(0).permutation(len(expected))):
        assert_same(actual.take(order, labels_only=labels_only), expected.take(order), LABELS)
        assert in_memory(path) == 0
    shard = shards.Shard(path / "shards" / "00000.safetensors")
    assert shard.arrays["positions"].sum() and in_memory(path) > 0, "a column as a whole is mapped"


def flip(path, place=-5):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_verify_lists_the_corrupted_shards(copy):
    Store(copy).verify()
    for number in (3, 11):
        flip(copy / "shards" / f"{number:05d}.safetensors")
    with pytest.raises(
        DatasetError, match=r"2 of 17 shards differ.*: 00003.safetensors, 00011.safetensors\. "
    ):
        Store(copy).verify()


@pytest.mark.parametrize(
    "spoil, actual",
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(b""), "has 0 bytes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "has [0-9]+ bytes"),
    ],
)
def test_missing_or_truncated_shard_is_reported_on_opening(copy, spoil, actual):
    file = copy / "shards" / "00009.safetensors"
    size = file.stat().st_size
    spoil(file)
    with pytest.raises(
        DatasetError, match=f"00009.safetensors: {actual}, expected {size} bytes. Convert .* again"
    ):
        Store(copy)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        '{"version": 1}',
        '{"format": "mlip_jax store"}',
        '{"format": "mlip_jax store", "version": "1"}',
        "\udcff",
    ],
)
def test_corrupted_manifest_is_rejected(copy, content):
    (copy / "manifest.json").write_text(content, errors="surrogateescape")
    with pytest.raises(DatasetError, match="manifest.json: is corrupted.*convert again"):
        Store(copy)


def test_newer_version_and_other_formats_are_rejected(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    for change, words in (
        ({"version": 2}, "version 2, expected.*version 1 or earlier. Update"),
        ({"format": "other store"}, "'other store'"),
    ):
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(DatasetError, match=words):
            Store(copy)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:200]),
        lambda p: p.write_bytes(p.read_bytes().replace(b"}", b" ", 1)),  # a TokenError of NumPy
        lambda p: p.write_bytes(pickle.dumps([1, 2])),
    ],
)
def test_corrupted_index_is_rejected(copy, spoil):
    spoil(copy / "index" / "energy.npy")
    opened = Store(copy)
    with pytest.raises(
        DatasetError,
        match="energy.npy: .*missing or corrupted.*Delete manifest.json and convert again",
    ):
        opened.index("energy")
    assert len(opened.take([0])) == 1  # the shards are sound
    (copy / "manifest.json").unlink()
    conversion.convert(specs(copy)["molecules"], copy, num_processes=1, progress=False)
    assert len(Store(copy).index("energy")) == 102


def test_is_store(stores, tmp_path, copy):
    path, _ = stores["molecules"]
    assert is_store(path) and is_store(str(path))
    assert (
        not is_store(tmp_path / "nowhere")
        and not is_store(MOLECULES)
        and not is_store(path / "shards")
    )
    (copy / "manifest.json").unlink()
    assert not is_store(copy)
    with pytest.raises(DatasetError, match="no manifest.json: .*an unfinished conversion.*resume"):
        Store(copy)


def test_no_official_split_and_level_of_theory(stores):
    actual = Store(stores["molecules"][0])
    assert actual.official_split() is None and actual.level_of_theory.startswith("GFN2-xTB")


def test_removed_structures_have_no_number(stores):
    """Structures that filters over conformations removed are only in the shards."""
    path, expected = stores["with holes"]
    actual = Store(path)
    assert sum(s["structures"] for s in actual.manifest["shards"]) == 102 > len(actual)
    physical = np.load(path / "index" / "physical.npy")
    assert physical.shape == (len(actual),) and (np.diff(physical) > 0).all()
    kept = {f"{s.source}#{s.conformer}" for s in expected}
    removed = [line.split(",") for line in (path / "removed.csv").read_text().splitlines()[1:]]
    assert {reason for _, reason in removed} == {"energy outlier"} and len(removed) == 102 - len(
        actual
    )
    assert not kept & {identity for identity, _ in removed}
    assert actual.manifest["counts"]["removed"] == {"energy outlier": len(removed)}


class Hesitant(OrderedDict):
    """Dictionary that lets other threads run between finding and using a shard."""

    def get(self, key):
        actual = super().get(key)
        time.sleep(0)
        return actual


def test_threads_share_a_store(stores, monkeypatch):
    """With few open shards, one thread closes a shard that another is about to use."""
    monkeypatch.setattr(store, "_OPEN_SHARDS", 2)
    path, expected = stores["molecules"]
    with monkeypatch.context() as patch:
        patch.setattr(collections, "OrderedDict", Hesitant)
        actual = Store(path)

    def read(seed):
        for s in np.random.default_rng(seed).permutation(len(expected)):
            np.testing.assert_allclose(
                actual.take([s], labels_only=True).energy, expected.energy[[s]]
            )
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "..", "", 3])
def test_shards_are_only_files_of_the_store(tmp_path, name):
    """Detects a store of other people that reads, or replaces, the user's files."""
    shard = {"file": name, "bytes": 1, "structures": 0, "sha256": ""}
    manifest = {"format": store.FORMAT, "version": 1, "structures": 0, "shards": [shard]}
    manifest |= {"periodic": False, "filtered": False, "official_split": None}
    manifest |= {"level_of_theory": "", "filters": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="is not a plain file name"):
        Store(tmp_path)
