"""Checkpoints: bit-exact, and never worse off after a damaged, missing or unfinished one."""

import contextlib
import logging
import os
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax import checkpoint
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
    made = CheckpointStore(tmp_path / "checkpoints", keep=3)
    yield made
    made.close()


def assert_holds(restored, step):
    assert restored.step == step == restored.metadata["step"]
    np.testing.assert_array_equal(restored.arrays["w"], tree_of(step)["w"])
    np.testing.assert_array_equal(restored.arrays["b"], tree_of(step)["b"])


def test_round_trip_is_bit_exact(store):
    store.save(7, TREE, METADATA)
    restored = store.restore()
    expected = to_arrays(TREE)
    assert restored.step == 7 and sorted(restored.arrays) == sorted(expected)
    for key, value in expected.items():
        found = restored.arrays[key]
        assert found.dtype == value.dtype and found.shape == value.shape
        assert found.tobytes() == value.tobytes()
    for key, value in METADATA.items():
        assert restored.metadata[key] == value


def test_tree_of_the_same_kind_comes_back(store):
    store.save(1, TREE, {})
    tree = from_arrays(TREE, store.restore().arrays)
    assert tree["params"]["list"][0].tolist() == [0, 1, 2]
    params = from_arrays(TREE["params"], store.restore().arrays, "params/")
    np.testing.assert_array_equal(params["dense"]["kernel"], TREE["params"]["dense"]["kernel"])


def test_device_arrays_are_stored(store):
    store.save(1, {"a": jnp.arange(4.0)}, {})
    np.testing.assert_array_equal(store.restore().arrays["a"], np.arange(4.0))


def test_newest_first_and_only_so_many(store):
    assert store.restore() is None and store.steps() == []
    for step in (1, 2, 5, 9):
        store.save(step, tree_of(step), {})
    assert store.steps() == [2, 5, 9]
    assert_holds(store.restore(), 9)


def test_the_same_step_is_replaced(store):
    store.save(2, tree_of(2), {})
    store.save(3, tree_of(1), {"note": "first"})
    store.save(3, tree_of(3), {"note": "second"})
    restored = store.restore()
    assert_holds(restored, 3)
    assert restored.metadata["note"] == "second" and store.steps() == [2, 3]


def test_another_process_reads_it(store):
    store.save(4, tree_of(4), {})
    reader = CheckpointStore(store.directory, read_only=True)
    assert_holds(reader.restore(), 4)
    for save in (reader.save, reader.save_in_background):
        with pytest.raises(CheckpointError, match="opened with read_only=True"):
            save(5, tree_of(5), {})
    reader.close()


def test_reading_where_nothing_is(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints there"):
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
    """A directory with checkpoints of the steps 1 and 2."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    made = CheckpointStore(directory)
    for step in (1, 2):
        made.save(step, tree_of(step), {"config": {"name": "painn"}, "statistics": {"cutoff": 5.0}})
    made.close()
    return directory


# orbax closes its event loop at the first array that cannot be read; those still being read find it closed
@pytest.mark.filterwarnings(r"ignore:(?s)Exception ignored in.*Event loop is closed:Warning")
@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_newest_gives_way_to_the_one_before(two_checkpoints, tmp_path, caplog, damage):
    """Each file of the newest one in turn: what is restored is whole, and a fall back is told."""
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
        damage(copy / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=checkpoint.__name__):
            reader = CheckpointStore(copy, read_only=True)
            restored = reader.restore()
            reader.close()
        assert_holds(restored, restored.step)
        assert restored.metadata["config"] == {"name": "painn"}, name
        assert restored.metadata["statistics"] == {"cutoff": 5.0}, name
        warned = any(
            r.name == checkpoint.__name__ and "is damaged" in r.getMessage() for r in caplog.records
        )
        assert warned == (restored.step == 1), name
        fell_back += restored.step == 1
    assert fell_back > 0


def test_directories_emptied_or_missing(two_checkpoints, tmp_path):
    for n, names in enumerate(
        (["arrays"], ["metadata"], [p.name for p in (two_checkpoints / "2").iterdir()])
    ):
        copy = tmp_path / str(n)
        shutil.copytree(two_checkpoints, copy)
        for name in names:
            path = copy / "2" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        reader = CheckpointStore(copy, read_only=True)
        assert_holds(reader.restore(), 1)
        reader.close()


def test_all_damaged(two_checkpoints, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    for step in (1, 2):
        shutil.rmtree(copy / str(step) / "arrays")
    reader = CheckpointStore(copy, read_only=True)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[1, 2\] can be read"):
        reader.restore()
    reader.close()


def test_writing_goes_on_after_a_fall_back(two_checkpoints, tmp_path):
    """A run that resumed from step 1 writes step 2 anew over the damaged one."""
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    shutil.rmtree(copy / "2" / "arrays")
    again = CheckpointStore(copy)
    assert_holds(again.restore(), 1)
    again.save(2, tree_of(2), {})
    assert_holds(again.restore(), 2)
    again.save(3, tree_of(3), {})
    assert_holds(again.restore(), 3)
    again.close()


def test_damaged_ones_are_removed_first(two_checkpoints, tmp_path):
    """A damaged checkpoint of a later step must not push out what is written after the fall back."""
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    (copy / "2").rename(copy / "8")
    shutil.copytree(copy / "8", copy / "9")
    for step in (8, 9):
        shutil.rmtree(copy / str(step) / "arrays")
    with contextlib.closing(CheckpointStore(copy, keep=2)) as again:
        assert_holds(again.restore(), 1)
        again.save(3, tree_of(3), {})
        assert again.steps() == [1, 3]
        again.save(4, tree_of(4), {})
        assert again.steps() == [3, 4]


@settings(deadline=None, max_examples=6)
@given(keep=st.integers(1, 3), steps=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_what_was_just_written_stays(tmp_path_factory, keep, steps):
    with contextlib.closing(CheckpointStore(tmp_path_factory.mktemp("some"), keep=keep)) as made:
        for n, step in enumerate(steps):
            before = made.steps()
            made.save(step, tree_of(step), {"turn": n})
            assert step in made.steps() and set(made.steps()) <= {*before, step}
            assert len(made.steps()) == min(keep, len({*before, step}))
        newest = made.restore()
        assert_holds(newest, max(made.steps()))
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
        patch.setattr(store._orbax, "save", fail_with_full_disk)
        with pytest.raises(
            CheckpointError, match="step 3 cannot be written.*No space left.*free some space"
        ):
            store.save(3, tree_of(3), {})
    assert store.steps() == [1, 2]
    assert_holds(store.restore(), 2)
    store.save(3, tree_of(3), {})
    assert_holds(store.restore(), 3)


def test_full_disk_while_replacing_keeps_the_checkpoint(store, monkeypatch):
    """The only checkpoint must not be deleted before its successor is written."""
    store.save(5, tree_of(5), {})
    with monkeypatch.context() as patch:
        patch.setattr(store._orbax, "save", fail_with_full_disk)
        with pytest.raises(CheckpointError):
            store.save(5, tree_of(5), {"note": "again"})
    assert_holds(store.restore(), 5)
    assert [p.name for p in store.directory.iterdir()] == ["5"]


def test_run_that_ended_while_replacing(store):
    store.save(5, tree_of(5), {})
    (store.directory / "5").rename(store.directory / "5.replaced")
    again = CheckpointStore(store.directory)
    assert_holds(again.restore(), 5)
    again.save(5, tree_of(5), {})
    assert [p.name for p in store.directory.iterdir() if p.is_dir()] == ["5"]
    again.close()


def test_reading_while_the_only_one_is_replaced(store):
    store.save(5, tree_of(5), {})
    (store.directory / "5").rename(store.directory / "5.replaced")
    with contextlib.closing(CheckpointStore(store.directory, read_only=True)) as reader:
        assert reader.steps() == [5]
        assert_holds(reader.restore(), 5)
    assert (store.directory / "5.replaced").is_dir()


def test_unfinished_ones_do_not_count_and_give_back_their_space(store):
    store.save(1, tree_of(1), {})
    unfinished = store.directory / "2.orbax-checkpoint-tmp"
    shutil.copytree(store.directory / "1", unfinished)
    assert store.steps() == [1]
    store.save(3, tree_of(3), {})
    assert sorted(p.name for p in store.directory.iterdir()) == ["1", "3"]


def test_on_the_disk_before_the_older_one_goes(tmp_path, monkeypatch):
    opened, synced, steps, fsync, open_file = {}, [], [], os.fsync, os.open

    def opening(path, *args, **kwargs):
        descriptor = open_file(path, *args, **kwargs)
        opened[descriptor] = Path(path)
        return descriptor

    def syncing(descriptor):
        fsync(descriptor)
        synced.append(opened[descriptor])
        steps.append({p.name for p in made.directory.iterdir()})

    with contextlib.closing(CheckpointStore(tmp_path, keep=1)) as made:
        made.save(1, tree_of(1), {})
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", opening)
            patch.setattr(os, "fsync", syncing)
            made.save(2, tree_of(2), {})
        assert set(synced) == {tmp_path, tmp_path / "2", *(tmp_path / "2").rglob("*")}
        assert all(names == {"1", "2"} for names in steps)
        assert made.steps() == [2]


def fail_with_full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


class Gate:
    """Stands before a store's writing: holds it until opened, and knows which threads came through."""

    def __init__(self, store, monkeypatch):
        self.open, self.threads = threading.Event(), []
        for name in ("to_arrays", "_checksum"):
            monkeypatch.setattr(checkpoint, name, self._noting(getattr(checkpoint, name)))
        monkeypatch.setattr(store._orbax, "save", self._held(store._orbax.save))

    def _noting(self, function):
        def noting(*args):
            self.threads.append(threading.current_thread())
            return function(*args)

        return noting

    def _held(self, function):
        def held(*args, **kwargs):
            assert self.open.wait(60)
            return self._noting(lambda: function(*args, **kwargs))()

        return held


def test_background_saves_leave_the_caller_alone(store, monkeypatch):
    gate, metadata = Gate(store, monkeypatch), {"nested": {"value": 1}}
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
    assert_holds(store.restore(), 2)
    with contextlib.closing(CheckpointStore(store.directory, read_only=True)) as reader:
        assert reader._read(1).metadata["nested"] == {"value": 1}


def test_reading_waits_for_the_save_under_way(store, monkeypatch):
    gate = Gate(store, monkeypatch)
    store.save_in_background(1, tree_of(1), {})
    threading.Timer(0.1, gate.open.set).start()
    assert_holds(store.restore(), 1)


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
        patch.setattr(store._orbax, "save", fail_with_full_disk)
        store.save_in_background(1, tree_of(2), {})
        assert_holds(store.restore(), 1)  # reading does not take the error away
    with pytest.raises(CheckpointError, match="step 1 cannot be written.*No space left"):
        NEXT_CALLS[call](store)
    if call != "close":
        store.wait()
        assert store.steps() == [1]
        store.save_in_background(5, tree_of(5), {})
    store.close()
    with contextlib.closing(CheckpointStore(tmp_path, read_only=True)) as reader:
        assert_holds(reader.restore(), 1 if call == "close" else 5)


def test_metadata_that_json_cannot_hold_is_refused_at_once(store):
    with pytest.raises(TypeError, match="JSON serializable"):
        store.save_in_background(1, tree_of(1), {"array": np.zeros(2)})
    assert not store.busy and store.steps() == []


def test_two_stores_at_a_time(tmp_path):
    made = [CheckpointStore(tmp_path / name, keep=2) for name in ("latest", "best")]
    for step in range(1, 6):
        for each in made:
            each.save_in_background(step, tree_of(step), {})
    for each in made:
        each.close()
        with contextlib.closing(CheckpointStore(each.directory, read_only=True)) as reader:
            assert reader.steps() == [4, 5]
            assert_holds(reader.restore(), 5)
