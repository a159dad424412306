"""Tests for checkpoints: bit-exact, and restored from an older one if the newest is corrupted."""

import contextlib
import logging
import os
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax import checkpoint, limits
from mlip_jax.checkpoint import CheckpointError, CheckpointStore, from_arrays, to_arrays

TREE = {
    "params": {
        "dense": {
            "kernel": np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32),
            "bias": np.array([np.pi, -0.0, 1e-45, np.inf, np.nan], np.float32),
        },
        "list": [np.arange(3, dtype=np.int32), np.float64(1.0) / 3],
    },
    "step": np.int32(7),
}
METADATA = {
    "config": {"model": {"name": "painn", "options": {"degrees": [1, 2]}}},
    "note": "Å",
    "value": 0.1 + 0.2,
}


def tree_of(step):
    return {"w": np.full((4, 3), step, np.float32), "b": np.arange(step, dtype=np.float64)}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    yield store
    store.close()


def assert_is_of_step(restored, step):
    assert restored.step == step == restored.metadata["step"]
    np.testing.assert_array_equal(restored.arrays["w"], tree_of(step)["w"])
    np.testing.assert_array_equal(restored.arrays["b"], tree_of(step)["b"])


def test_round_trip_is_bit_exact(store):
    store.save(7, TREE, METADATA)
    restored = store.restore()
    expected = to_arrays(TREE)
    assert restored.step == 7 and sorted(restored.arrays) == sorted(expected)
    for key, value in expected.items():
        array = restored.arrays[key]
        assert array.dtype == value.dtype and array.shape == value.shape
        assert array.tobytes() == value.tobytes()
    for key, value in METADATA.items():
        assert restored.metadata[key] == value


def test_tree_with_the_same_structure_is_restored(store):
    store.save(1, TREE, {})
    tree = from_arrays(TREE, store.restore().arrays)
    assert tree["params"]["list"][0].tolist() == [0, 1, 2]
    params = from_arrays(TREE["params"], store.restore().arrays, "params/")
    np.testing.assert_array_equal(params["dense"]["kernel"], TREE["params"]["dense"]["kernel"])


def test_device_arrays_are_stored(store):
    store.save(1, {"a": jnp.arange(4.0)}, {})
    np.testing.assert_array_equal(store.restore().arrays["a"], np.arange(4.0))


def test_newest_is_restored_and_old_ones_are_removed(store):
    assert store.restore() is None and store.steps() == []
    for step in (1, 2, 5, 9):
        store.save(step, tree_of(step), {})
    assert store.steps() == [2, 5, 9]
    assert_is_of_step(store.restore(), 9)


def test_the_same_step_is_replaced(store):
    store.save(2, tree_of(2), {})
    store.save(3, tree_of(1), {"note": "first"})
    store.save(3, tree_of(3), {"note": "second"})
    restored = store.restore()
    assert_is_of_step(restored, 3)
    assert restored.metadata["note"] == "second" and store.steps() == [2, 3]


def test_read_only_stores_read_but_do_not_write(store):
    store.save(4, tree_of(4), {})
    reader = CheckpointStore(store.directory, read_only=True)
    assert_is_of_step(reader.restore(), 4)
    for save in (reader.save, reader.save_in_background):
        with pytest.raises(CheckpointError, match="opened with read_only=True"):
            save(5, tree_of(5), {})
    reader.close()


def test_reading_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="contains no checkpoints"):
        CheckpointStore(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Return a directory with checkpoints of the steps 1 and 2."""
    directory, metadata = (
        tmp_path_factory.mktemp("two") / "checkpoints",
        {"config": {"name": "painn"}, "statistics": {"cutoff": 5.0}},
    )
    store = CheckpointStore(directory)
    for step in (1, 2):
        store.save(step, tree_of(step), metadata)
    store.close()
    return directory


# orbax closes its event loop when an array cannot be read, while other reads still use it
@pytest.mark.filterwarnings(r"ignore:(?s)Exception ignored in.*Event loop is closed:Warning")
@pytest.mark.parametrize("corrupt", [truncate, flip])
def test_corrupted_newest_falls_back_to_the_previous_one(
    two_checkpoints, tmp_path, caplog, corrupt
):
    """For any corrupted file, the restored checkpoint is valid, and a fallback is logged."""
    files = sorted(
        f.relative_to(two_checkpoints) for f in (two_checkpoints / "2").rglob("*") if f.is_file()
    )
    assert files
    fell_back = 0
    for n, name in enumerate(files):
        copy = tmp_path / str(n)
        shutil.copytree(two_checkpoints, copy)
        if (copy / name).stat().st_size == 0:
            continue
        corrupt(copy / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=checkpoint.__name__):
            reader = CheckpointStore(copy, read_only=True)
            restored = reader.restore()
            reader.close()
        assert_is_of_step(restored, restored.step)
        assert restored.metadata["config"] == {"name": "painn"}, name
        assert restored.metadata["statistics"] == {"cutoff": 5.0}, name
        warned = any(
            r.name == checkpoint.__name__ and "corrupted checkpoint" in r.getMessage()
            for r in caplog.records
        )
        assert warned == (restored.step == 1), name
        fell_back += restored.step == 1
    assert fell_back > 0


def test_missing_directories_fall_back_to_the_previous_checkpoint(two_checkpoints, tmp_path):
    for n, names in enumerate(
        (["arrays"], ["metadata"], [p.name for p in (two_checkpoints / "2").iterdir()])
    ):
        copy = tmp_path / str(n)
        shutil.copytree(two_checkpoints, copy)
        for name in names:
            path = copy / "2" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        reader = CheckpointStore(copy, read_only=True)
        assert_is_of_step(reader.restore(), 1)
        reader.close()


def test_all_corrupted(two_checkpoints, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    for step in (1, 2):
        shutil.rmtree(copy / str(step) / "arrays")
    reader = CheckpointStore(copy, read_only=True)
    with pytest.raises(CheckpointError, match=r"all checkpoints are corrupted, steps \[1, 2\]"):
        reader.restore()
    reader.close()


def test_a_small_checkpoint_of_large_arrays_is_rejected(store, monkeypatch):
    """Compressed zeros: 100 kB on disk would take 4 GB of memory."""
    store.save(1, {"a": np.zeros(2**21)}, {})
    assert store.read_step(1).arrays["a"].shape == (2**21,)
    monkeypatch.setattr(limits, "SMALL", 2**20)
    with pytest.raises(CheckpointError, match="bytes per compressed byte"):
        store.read_step(1)


def test_saving_after_a_fallback(two_checkpoints, tmp_path):
    """A run that resumed from step 1 replaces the corrupted checkpoint of step 2."""
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    shutil.rmtree(copy / "2" / "arrays")
    again = CheckpointStore(copy)
    assert_is_of_step(again.restore(), 1)
    again.save(2, tree_of(2), {})
    assert_is_of_step(again.restore(), 2)
    again.save(3, tree_of(3), {})
    assert_is_of_step(again.restore(), 3)
    again.close()


def test_corrupted_ones_are_removed_first(two_checkpoints, tmp_path):
    """Corrupted checkpoints of later steps do not displace those saved after the fallback."""
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    (copy / "2").rename(copy / "8")
    shutil.copytree(copy / "8", copy / "9")
    for step in (8, 9):
        shutil.rmtree(copy / str(step) / "arrays")
    with contextlib.closing(CheckpointStore(copy, keep=2)) as again:
        assert_is_of_step(again.restore(), 1)
        again.save(3, tree_of(3), {})
        assert again.steps() == [1, 3]
        again.save(4, tree_of(4), {})
        assert again.steps() == [3, 4]


@settings(deadline=None, max_examples=6)
@given(keep=st.integers(1, 3), steps=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_the_last_saved_checkpoint_is_kept(tmp_path_factory, keep, steps):
    with contextlib.closing(CheckpointStore(tmp_path_factory.mktemp("some"), keep=keep)) as store:
        for n, step in enumerate(steps):
            before = store.steps()
            store.save(step, tree_of(step), {"turn": n})
            assert step in store.steps() and set(store.steps()) <= {*before, step}
            assert len(store.steps()) == min(keep, len({*before, step}))
        newest = store.restore()
        assert_is_of_step(newest, max(store.steps()))
        assert newest.metadata["turn"] == max(
            n for n, step in enumerate(steps) if step == newest.step
        )


def test_mismatch_lists_the_parameters():
    template = {"a": np.zeros((2, 3)), "b": {"c": np.zeros(4)}, "same": np.zeros(1)}
    arrays = {
        "params/a": np.zeros((2, 2)),
        "params/d": np.zeros(5),
        "params/same": np.zeros(1),
        "ema/b/c": np.zeros(4),
    }
    with pytest.raises(CheckpointError) as caught:
        from_arrays(template, arrays, "params/")
    message = str(caught.value)
    assert "missing: b/c (4,)" in message and "not in the model: d (5,)" in message
    assert "a: stored (2, 2), expected (2, 3)" in message and "same" not in message


def test_full_disk_leaves_older_ones_readable(store, monkeypatch):
    store.save(1, tree_of(1), {})
    store.save(2, tree_of(2), {})
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", fail_with_full_disk)
        with pytest.raises(
            CheckpointError, match="step 3 cannot be written.*No space left.*Free up disk space"
        ):
            store.save(3, tree_of(3), {})
    assert store.steps() == [1, 2]
    assert_is_of_step(store.restore(), 2)
    store.save(3, tree_of(3), {})
    assert_is_of_step(store.restore(), 3)


def test_full_disk_while_replacing_keeps_the_checkpoint(store, monkeypatch):
    """The only checkpoint must not be deleted before its successor is written."""
    store.save(5, tree_of(5), {})
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", fail_with_full_disk)
        with pytest.raises(CheckpointError):
            store.save(5, tree_of(5), {"note": "again"})
    assert_is_of_step(store.restore(), 5)
    assert [p.name for p in store.directory.iterdir()] == ["5"]


def test_interrupted_replacement_is_restored(store):
    store.save(5, tree_of(5), {})
    (store.directory / "5").rename(store.directory / "5.replaced")
    again = CheckpointStore(store.directory)
    assert_is_of_step(again.restore(), 5)
    again.save(5, tree_of(5), {})
    assert [p.name for p in store.directory.iterdir() if p.is_dir()] == ["5"]
    again.close()


def test_reading_during_a_replacement(store):
    store.save(5, tree_of(5), {})
    (store.directory / "5").rename(store.directory / "5.replaced")
    with contextlib.closing(CheckpointStore(store.directory, read_only=True)) as reader:
        assert reader.steps() == [5]
        assert_is_of_step(reader.restore(), 5)
    assert (store.directory / "5.replaced").is_dir()


def test_unfinished_checkpoints_are_ignored_and_removed(store):
    store.save(1, tree_of(1), {})
    unfinished = store.directory / "2.orbax-checkpoint-tmp"
    shutil.copytree(store.directory / "1", unfinished)
    assert store.steps() == [1]
    store.save(3, tree_of(3), {})
    assert sorted(p.name for p in store.directory.iterdir()) == ["1", "3"]


def test_checkpoint_is_synced_before_the_older_one_is_removed(tmp_path, monkeypatch):
    opened, synced, steps, fsync, open_file = {}, [], [], os.fsync, os.open

    def opening(path, *args, **kwargs):
        descriptor = open_file(path, *args, **kwargs)
        opened[descriptor] = Path(path)
        return descriptor

    def syncing(descriptor):
        fsync(descriptor)
        synced.append(opened[descriptor])
        steps.append({p.name for p in store.directory.iterdir()})

    with contextlib.closing(CheckpointStore(tmp_path, keep=1)) as store:
        store.save(1, tree_of(1), {})
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", opening)
            patch.setattr(os, "fsync", syncing)
            store.save(2, tree_of(2), {})
        assert set(synced) == {tmp_path, tmp_path / "2", *(tmp_path / "2").rglob("*")}
        assert all(names == {"1", "2"} for names in steps)
        assert store.steps() == [2]


def fail_with_full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


class Gate:
    """Block the writing of stores until the gate is opened, and record the writing threads."""

    def __init__(self, monkeypatch):
        self.open, self.threads = threading.Event(), []
        for name in ("to_arrays", "_checksum"):
            monkeypatch.setattr(checkpoint, name, self._record_thread(getattr(checkpoint, name)))
        monkeypatch.setattr(ocp.Checkpointer, "save", self._block(ocp.Checkpointer.save))

    def _record_thread(self, function):
        def recorded(*args):
            self.threads.append(threading.current_thread())
            return function(*args)

        return recorded

    def _block(self, function):
        def blocked(*args, **kwargs):
            assert self.open.wait(60)
            return self._record_thread(lambda: function(*args, **kwargs))()

        return blocked


def test_background_saves_do_not_block_the_caller(store, monkeypatch):
    gate, metadata = Gate(monkeypatch), {"nested": {"value": 1}}
    assert not store.busy
    store.save_in_background(1, {k: jnp.asarray(v) for k, v in tree_of(1).items()}, metadata)
    assert store.busy and not (store.directory / "1").exists()
    metadata["nested"]["value"] = 2
    gate.open.set()
    store.save_in_background(2, tree_of(2), metadata)
    assert (store.directory / "1").is_dir()  # the second waits for the first
    store.wait()
    assert not store.busy
    assert (
        len(gate.threads) == 6
        and len(set(gate.threads)) == 1
        and threading.current_thread() not in gate.threads
    )
    assert_is_of_step(store.restore(), 2)
    with contextlib.closing(CheckpointStore(store.directory, read_only=True)) as reader:
        assert reader.read_step(1).metadata["nested"] == {"value": 1}


def test_reading_waits_for_the_running_save(store, monkeypatch):
    gate = Gate(monkeypatch)
    store.save_in_background(1, tree_of(1), {})
    threading.Timer(0.1, gate.open.set).start()
    assert_is_of_step(store.restore(), 1)


NEXT_CALLS = {
    "save": lambda store: store.save(4, tree_of(4), {}),
    "save_in_background": lambda store: store.save_in_background(4, tree_of(4), {}),
    "wait": CheckpointStore.wait,
    "close": CheckpointStore.close,
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_error_in_the_background_is_raised_once(tmp_path, monkeypatch, call):
    store = CheckpointStore(tmp_path)
    store.save(1, tree_of(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", fail_with_full_disk)
        store.save_in_background(1, tree_of(2), {})
        assert_is_of_step(store.restore(), 1)  # reading does not clear the error
    with pytest.raises(CheckpointError, match="step 1 cannot be written.*No space left"):
        NEXT_CALLS[call](store)
    if call != "close":
        store.wait()
        assert store.steps() == [1]
        store.save_in_background(5, tree_of(5), {})
    store.close()
    with contextlib.closing(CheckpointStore(tmp_path, read_only=True)) as reader:
        assert_is_of_step(reader.restore(), 1 if call == "close" else 5)


def test_metadata_that_is_not_json_is_rejected_at_once(store):
    with pytest.raises(TypeError, match="JSON serializable"):
        store.save_in_background(1, tree_of(1), {"array": np.zeros(2)})
    assert not store.busy and store.steps() == []


def test_two_stores_at_the_same_time(tmp_path):
    stores = [CheckpointStore(tmp_path / name, keep=2) for name in ("latest", "best")]
    for step in range(1, 6):
        for store in stores:
            store.save_in_background(step, tree_of(step), {})
    for store in stores:
        store.close()
        with contextlib.closing(CheckpointStore(store.directory, read_only=True)) as reader:
            assert reader.steps() == [4, 5]
            assert_is_of_step(reader.restore(), 5)
