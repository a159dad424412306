"""Tests for shards: round trip, access by other libraries, and corruption."""

import errno
import json
import os

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.near_origin import is_far
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.shards import TEXTS, Shard, checksum, encode, write_shard
from mlip_jax.structure import Structure

# NumPy strings lose trailing zeros, and surrogates are not characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@st.composite
def structures(draw, min_size=0):
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    some_periodic, some_forces = draw(st.booleans()), draw(st.booleans())
    items = []
    for s, n in enumerate(draw(st.lists(st.integers(0, 6), min_size=min_size, max_size=7))):
        periodic = some_periodic and draw(st.booleans())
        items.append(
            Structure(
                rng.integers(1, 119, n).astype(np.int32),
                rng.normal(size=(n, 3)) * 10.0 ** rng.integers(-3, 4),
                energy=draw(st.sampled_from([float("nan"), -1e5 - 1 / 3, 2.5])),
                forces=rng.normal(size=(n, 3)) if some_forces and draw(st.booleans()) else None,
                charge=float(rng.integers(-2, 3)),
                cell=rng.normal(size=(3, 3)) if periodic else None,
                pbc=np.array([True, s % 2 == 0, False]) if periodic else None,
                molecule=draw(TEXT),
                smiles=draw(TEXT),
                subset=draw(TEXT),
                source=draw(TEXT),
                conformer=int(rng.integers(0, 2**40)),
                record=int(rng.integers(0, 2**40)),
                properties={"gap": float(rng.normal()), "dipole": rng.normal(size=3)}
                if s % 3
                else {},
                atom_properties={
                    "charges": rng.normal(size=n),
                    "quadrupoles": rng.normal(size=(n, 2, 3)),
                },
            )
        )
    return items


def rounded(columns: Columns, dtype, far: bool) -> dict:
    """Return all fields of `columns`, rounded to `dtype` where the shard stores it.

    Positions `far` from the origin are stored in double precision.
    """
    fields = dict(vars(columns))
    for name in ("forces",) if far else ("positions", "forces"):
        fields[name] = fields[name].astype(dtype).astype(np.float64)
    fields["atom_properties"] = {
        k: v.astype(dtype).astype(np.float64) for k, v in columns.atom_properties.items()
    }
    return fields


def assert_same(actual: Columns, expected: dict):
    np.testing.assert_equal(dict(vars(actual)), expected)
    assert (
        actual.positions.dtype == actual.forces.dtype == np.float64
        and actual.numbers.dtype == np.int32
    )
    assert actual.pbc is None or actual.pbc.dtype == bool


@pytest.fixture(scope="module")
def shard_path(tmp_path_factory):
    return tmp_path_factory.mktemp("shards") / "00000.safetensors"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=40, deadline=None)
@given(items=structures(), cuts=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_round_trip(shard_path, dtype, items, cuts):
    columns = Columns.from_structures(items)
    write_shard(shard_path, encode(columns, dtype))
    shard = Shard(shard_path)
    assert len(shard) == len(items)
    far = is_far(columns.positions)
    assert_same(shard.columns(0, len(items)), rounded(columns, dtype, far))
    start, stop = sorted(min(c, len(items)) for c in cuts)
    assert_same(
        shard.columns(start, stop), rounded(columns.take(np.arange(start, stop)), dtype, far)
    )


@settings(max_examples=20, deadline=None)
@given(items=structures(min_size=1), seed=st.integers(0, 99))
def test_texts_by_code(shard_path, items, seed):
    write_shard(shard_path, encode(Columns.from_structures(items)))
    shard = Shard(shard_path)
    drawn = np.random.default_rng(seed).integers(0, len(items), 5)
    for name in TEXTS:
        codes = shard.arrays[f"text.{name}.code"][drawn]
        assert shard.texts(name, codes).tolist() == [getattr(items[s], name) for s in drawn]
        assert shard.texts(name, codes[:0]).tolist() == []


def water(n=4, **fields) -> Columns:
    rng = np.random.default_rng(0)
    return Columns.from_structures(
        [
            Structure(
                np.array([8, 1, 1]),
                rng.normal(size=(3, 3)),
                energy=-2000.0 - s,
                forces=rng.normal(size=(3, 3)),
                molecule="水",
                smiles="O",
                conformer=s,
                record=s,
                subset="",
                source=f"file:{s}",
                **fields,
            )
            for s in range(n)
        ]
    )


@settings(max_examples=20, deadline=None)
@given(items=structures())
def test_readable_by_the_safetensors_library(shard_path, items):
    arrays = encode(Columns.from_structures(items))
    write_shard(shard_path, arrays)
    actual = safetensors.numpy.load_file(shard_path)
    assert actual.keys() == arrays.keys()
    for name, values in arrays.items():
        assert actual[name].dtype == values.dtype
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def test_missing_labels_take_no_space(tmp_path):
    bare = Columns.from_structures([Structure(np.array([1, 1]), np.eye(3)[:2])])
    arrays = encode(bare)
    assert not {"forces", "cell", "pbc"} & arrays.keys()
    assert (
        encode(water())["positions"].dtype == np.float32
        and encode(water())["energy"].dtype == np.float64
    )


def test_bytes_and_checksum_are_always_the_same(tmp_path):
    sums = [
        write_shard(tmp_path / name, encode(water(properties={"b": 1.0, "a": 2.0})))
        for name in ("x", "y")
    ]
    swapped = write_shard(tmp_path / "z", encode(water(properties={"a": 2.0, "b": 1.0})))
    assert len({(tmp_path / name).read_bytes() for name in "xyz"}) == 1
    assert sums[0] == sums[1] == swapped == checksum(tmp_path / "x")
    assert write_shard(tmp_path / "x", encode(water(5))) != sums[0]


def test_writing_replaces_a_shard_without_disturbing_readers(tmp_path):
    path = tmp_path / "00000.safetensors"
    write_shard(path, encode(water(4)))
    before = Shard(path)
    write_shard(path, encode(water(6)))
    assert len(before.columns(0, 4)) == 4 and len(Shard(path)) == 6
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("before", [False, True])
def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, before):
    path = tmp_path / "00000.safetensors"
    if before:
        write_shard(path, encode(water(4)))
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(path, encode(water(9)))
    assert caught.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == kept


def corrupted(tmp_path, change):
    """Write a shard after applying `change` to its bytes."""
    path = tmp_path / "00007.safetensors"
    write_shard(path, encode(water()))
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def header_end(content):
    return 8 + int.from_bytes(content[:8], "little")


def with_header(content, header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[header_end(content) :]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: b"",
        lambda c: c[:5],
        lambda c: c[:100],
        lambda c: c[: header_end(c)],
        lambda c: c[:-1],
        lambda c: b"<html>404 not found</html>" * 20,
        lambda c: b"\xff" * 8 + c[8:],
        lambda c: bytes(len(c)),
        lambda c: with_header(c, []),
        lambda c: with_header(c, "text"),
        lambda c: with_header(c, 7),
        lambda c: with_header(c, {}),
        lambda c: with_header(c, {"energy": 1}),
        lambda c: with_header(
            c, {"energy": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}
        ),
        lambda c: with_header(
            c, {"energy": {"dtype": "F64", "shape": [-1], "data_offsets": [8, 0]}}
        ),
        lambda c: with_header(
            c, {"energy": {"dtype": "F64", "shape": [4], "data_offsets": [0, 32]}}
        ),
    ],
    ids=[
        "empty",
        "5 bytes",
        "100 bytes",
        "no data",
        "one byte short",
        "html",
        "long header",
        "zeros",
        "list",
        "text",
        "number",
        "nothing",
        "no entry",
        "unknown type",
        "negative",
        "columns missing",
    ],
)
def test_corrupted_file_is_reported(tmp_path, change):
    path = corrupted(tmp_path, change)
    with pytest.raises(
        DatasetError, match="00007.safetensors: the shard is corrupted.*convert again"
    ):
        Shard(path)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("offsets", [0, 3, 2**62, 9, 12]),
        ("offsets", [0, 3, 1, 9, 12]),
        ("offsets", [-3, 3, 6, 9, 12]),
        ("text.molecule.code", [-5, 0, 0, 0]),
        ("text.molecule.ends", [2**40]),
        ("text.molecule.bytes", [0xFF] * 10),
    ],
)
def test_rows_outside_of_a_column_are_reported(tmp_path, column, values):
    """Such numbers led to errors of NumPy, or to arrays of any size."""
    arrays = encode(water())
    arrays[column] = np.array(values, arrays[column].dtype)
    write_shard(tmp_path / "00007.safetensors", arrays)
    shard = Shard(tmp_path / "00007.safetensors")
    with pytest.raises(
        DatasetError, match="00007.safetensors: the shard is corrupted.*(rows|text)"
    ):
        for k in range(len(shard)):
            shard.columns(k, k + 1)


def test_flipped_header_bytes_give_an_error_or_no_harm(tmp_path):
    path = corrupted(tmp_path, lambda c: c)
    content = path.read_bytes()
    refused = 0
    for place in range(0, header_end(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert len(Shard(path)) >= 0  # any other error than DatasetError fails here
        except DatasetError as error:
            refused += 1
            assert "00007.safetensors" in str(error)
    assert refused > 0.7 * header_end(content)


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(DatasetError, match="00003.safetensors: the shard is missing"):
        Shard(tmp_path / "00003.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DatasetError, match="folder.safetensors"):
        Shard(tmp_path / "folder.safetensors")


def test_other_tensors_and_metadata_are_ignored(tmp_path):
    path = tmp_path / "00000.safetensors"
    arrays = encode(water()) | {"index.extra": np.arange(4, dtype=np.uint64)}
    path.write_bytes(safetensors.numpy.save(arrays, {"made by": "someone"}))
    shard = Shard(path)
    assert_same(shard.columns(0, 4), rounded(water(), np.float32, False))
    assert shard.arrays["index.extra"].tolist() == [0, 1, 2, 3]


def mapped_memory(path):
    """Return the resident bytes of the mappings of a file in this process."""
    total, in_file = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if line.split(" ", 1)[0].count("-") == 1:
                in_file = line.rstrip().endswith(str(path))
            elif in_file and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total
