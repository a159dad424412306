"""Tests for split files: numbers are read unchanged, and errors are located."""

import json
import pickle

import numpy as np
import pytest

from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.split_files import (
    load_split,
    read_split_file,
    read_split_files,
    save_split,
)

PARTS = {"train": [4, 0, 2], "valid": [7], "test": [1, 9]}


def plain(parts):
    assert all(numbers.dtype == np.int64 for numbers in parts.values())
    return {name: numbers.tolist() for name, numbers in parts.items()}


def text(path, numbers, head="", end="\n"):
    path.write_text(head + end.join(map(str, numbers)) + end)
    return path


@pytest.mark.parametrize(
    "names", [("train", "valid", "test"), ("train", "val", "test"), ("Train", "Validation", "Test")]
)
def test_json(tmp_path, names):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(dict(zip(names, PARTS.values()))))
    assert plain(read_split_file(path)) == PARTS
    assert plain(read_split_files(str(path), num_records=10)) == PARTS


@pytest.mark.parametrize(
    "names",
    [
        ("train_idx", "val_idx", "test_idx"),
        ("idx_train", "idx_val", "idx_test"),
        ("train", "valid", "test"),
    ],
)
@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_npz(tmp_path, names, dtype):
    np.savez(
        tmp_path / "split.npz", **{k: np.array(v, dtype) for k, v in zip(names, PARTS.values())}
    )
    assert plain(read_split_file(tmp_path / "split.npz")) == PARTS


def test_one_text_file_per_split(tmp_path):
    train = text(tmp_path / "index_train_01.csv", PARTS["train"], head="index\n")
    valid = text(tmp_path / "my-val.txt", PARTS["valid"], head="# drawn by hand\n\n", end="\r\n")
    np.save(tmp_path / "test.npy", np.array(PARTS["test"], np.int32))
    assert plain(read_split_file(train)) == {"train": PARTS["train"]}
    assert plain(read_split_files(f"{train}, {valid},{tmp_path / 'test.npy'}")) == PARTS


def test_files_of_any_name(tmp_path):
    a, b = text(tmp_path / "a.csv", PARTS["train"]), text(tmp_path / "b_train.csv", PARTS["test"])
    expected = {"train": PARTS["train"], "test": PARTS["test"]}
    assert plain(read_split_files(f"train={a}, test = {b}")) == expected
    assert plain(read_split_files({"train": a, "test": str(b)})) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0\n1\n2.5\n", "train.csv, line 3: expected one integer per line; found '2.5'"),
        ("0,1\n", "line 1: .* found '0,1'"),
        ("0\nindex\n", "line 2: .* found 'index'"),
        ("1_0\n", "line 1"),
        ("0\n99999999999999999999\n", "line 2"),
        ("index\n", "contains no numbers"),
        ("", "contains no numbers"),
        ("0\n-3\n", "'train' has 1 negative numbers, the first -3"),
        ("5\n6\n5\n6\n", "'train' has 2 repeated numbers, the first 5"),
        ("3\n10\n12\n", "'train' has 2 numbers beyond the last record 9, the first 10. Check"),
        ("1\n2\n10\n", "beyond the last record 9, the first 10. They seem to be counted from 1"),
    ],
)
def test_invalid_text_is_rejected(tmp_path, content, message):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_split_file(tmp_path / "train.csv", num_records=10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": [0, 1.5]}', "number 1 of 'train' must be an integer; found 1.5"),
        ('{"train": [true]}', "found True"),
        ('{"train": [0, "1"]}', "found '1'"),
        ('{"train": [[0]]}', r"found \[0\]"),
        ('{"train": [1e3]}', "found 1000.0"),
        ('{"train": [99999999999999999999]}', "found 9999"),
        ('{"train": 5}', "'train' must be a list"),
        ('{"train": [0], "fold": [1]}', "found 'train', 'fold'"),
        ('{"valid": [0], "val": [1]}', "found 'valid', 'val'"),
        ("[0, 1]", "found a list"),
        ("{}", "contains no split"),
        ('{"train": [0, 1', "is not valid JSON"),
        ('{"train": [0, 1], "test": [1, 0]}', "2 numbers are in both"),
    ],
)
def test_invalid_json_is_rejected(tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(DatasetError, match=message) as raised:
        read_split_file(tmp_path / "split.json")
    assert "split.json" in str(raised.value)


def test_pickles_are_rejected(tmp_path):
    """Object arrays and plain pickles are rejected before their content runs."""
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    np.savez(tmp_path / "split.npz", train=np.array([Evil()], object))
    (tmp_path / "train.npy").write_bytes(pickle.dumps(Evil()))
    np.savez(tmp_path / "archive.npz", train=np.arange(3))
    (tmp_path / "archive.npz").rename(tmp_path / "test.npy")
    for name in ("split.npz", "train.npy", "test.npy"):
        with pytest.raises(DatasetError, match=name):
            read_split_file(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["split.npz", "split.json", "train.csv", "train.npy"])
def test_missing_and_truncated_files_are_rejected(tmp_path, name):
    with pytest.raises(DatasetError, match=f"{name}: cannot be read: No such file"):
        read_split_file(tmp_path / name)
    np.savez(tmp_path / "whole.npz", train=np.arange(500))
    content = (tmp_path / "whole.npz").read_bytes()
    for corrupted in (content[: len(content) // 2], b"", b"\xff\xfe\x00\x01 no text"):
        (tmp_path / name).write_bytes(corrupted)
        with pytest.raises(DatasetError, match=name):
            read_split_file(tmp_path / name)


def test_floats_in_npz(tmp_path):
    np.savez(tmp_path / "split.npz", train=np.array([0.0, 1.0]))
    with pytest.raises(DatasetError, match="received float64"):
        read_split_file(tmp_path / "split.npz")


def test_file_names_without_a_split_are_rejected(tmp_path):
    a = text(tmp_path / "a.csv", [0])
    train = text(tmp_path / "train.csv", [0])
    for files, message in (
        (str(a), "cannot infer the split"),
        (f"dev={a}", "unknown split 'dev'"),
        (f"{train},train={a}", "second file for 'train'"),
        (f"test={a}", "no training split"),
        ("", "no training split in an empty list"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_split_files(files)


def test_overlapping_splits_of_two_files_are_rejected(tmp_path):
    files = {"train": text(tmp_path / "a.csv", [0, 1]), "test": text(tmp_path / "b.csv", [1, 2])}
    with pytest.raises(
        DatasetError, match=r"a.csv, .*b.csv: 1 numbers are in both 'train' and 'test', the first 1"
    ):
        read_split_files(files)


def test_save_and_load(tmp_path):
    parts = {name: np.array(numbers, np.int32) for name, numbers in (PARTS | {"valid": []}).items()}
    path = save_split(tmp_path / "split.npz", parts, {"by": "molecule", "seed": 3})
    loaded, meta = load_split(path)
    assert plain(loaded) == PARTS | {"valid": []}
    assert meta["by"] == "molecule" and meta["seed"] == 3
    assert meta["structures"] == {"train": 3, "valid": 0, "test": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["split.json", "split.npz"]


def test_files_of_two_splits_are_rejected(tmp_path):
    path = save_split(tmp_path / "split.npz", PARTS, {"seed": 0})
    old = path.with_suffix(".json").read_text()
    save_split(path, PARTS | {"valid": [8]}, {"seed": 1})
    path.with_suffix(".json").write_text(old)
    with pytest.raises(DatasetError, match="split.npz and split.json do not belong together"):
        load_split(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(DatasetError, match="split.json: cannot be read"):
        load_split(path)


def test_failed_save_keeps_the_old_split(tmp_path, monkeypatch):
    path = save_split(tmp_path / "split.npz", PARTS, {"seed": 0})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save_split(path, PARTS | {"valid": [8]}, {"seed": 1})
    assert plain(load_split(path)[0]) == PARTS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["split.json", "split.npz"]


def test_save_only_as_npz(tmp_path):
    with pytest.raises(ValueError, match="saved as .npz"):
        save_split(tmp_path / "split.json", PARTS, {})
