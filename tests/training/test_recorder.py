"""Tests for the recorded metrics: both files, rows after a resumption, and write errors."""

import csv
import struct
import threading

import pytest
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event

from mlip_jax.training.objectives import ForceField
from mlip_jax.training.recorder import Recorder, columns
from mlip_jax.workdir import WorkdirError

COLUMNS = columns(ForceField.columns)


def row(step):
    return {"step": step, "train_loss": 1.0 / step, "valid_loss": float("nan"), "beta": 0.9}


def events_of(workdir):
    """Return the events of TensorBoard's files in the order in which they were written."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def scalars_of(events):
    return [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]


def test_rows_are_in_both_files(tmp_path):
    recorder = Recorder(tmp_path, 0, COLUMNS)
    recorder.write(row(1))
    recorder.write(row(2))
    recorder.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["train_loss"], r["valid_loss"], r["mfu"]) for r in rows] == [
        ("1", "1", "nan", ""),
        ("2", "0.5", "nan", ""),
    ]
    events = events_of(tmp_path)
    assert scalars_of(events) == [
        (1, "train_loss", 1.0),
        (1, "beta", pytest.approx(0.9)),
        (2, "train_loss", 0.5),
        (2, "beta", pytest.approx(0.9)),
    ]
    assert all(e.wall_time > 1e9 for e in events)


def test_property_names_become_valid_tags(tmp_path):
    """The tags equal those of SummaryWriter, because each spelling is a separate series."""
    recorder = Recorder(tmp_path, 0, (*COLUMNS, "train_heat capacity (eV)"))
    recorder.write({"step": 1, "train_heat capacity (eV)": 2.0})
    recorder.close()
    assert scalars_of(events_of(tmp_path)) == [(1, "train_heat_capacity__eV_", 2.0)]


def test_rows_after_the_step_are_dropped(tmp_path):
    first = Recorder(tmp_path, 0, COLUMNS)
    for step in (1, 2, 3):
        first.write(row(step))
    first.close()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.2")  # of a run that was killed within it
    second = Recorder(tmp_path, 2, COLUMNS)
    second.write(row(3))
    second.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [r["step"] for r in csv.DictReader(file)] == ["1", "2", "3"]
    # a separate file, even within one second; TensorBoard drops older events from this step on
    events = events_of(tmp_path)
    assert [step for step, tag, _ in scalars_of(events) if tag == "beta"] == [1, 2, 3, 3]
    restart = next(i for i, e in enumerate(events) if e.HasField("session_log"))
    assert events[restart].step == 3 and [e.step for e in events[restart + 1 :]] == [3, 3]


def test_a_full_disk_is_an_error_of_the_metrics(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, 0, COLUMNS)
    monkeypatch.setattr(
        "mlip_jax.training.recorder.open_in_place", lambda path, *mode, **o: open("/dev/full", "a")
    )
    with pytest.raises(
        WorkdirError, match="metrics.csv: cannot be written: .*No space left on device.*then rerun"
    ):
        recorder.write(row(1))
    recorder.close()


def test_a_full_disk_is_an_error_of_tensorboard(tmp_path, monkeypatch):
    """The run must not wait forever for a dead thread, and must not continue silently."""
    monkeypatch.setattr(
        "mlip_jax.training.recorder.RecordWriter", lambda path: RecordWriter("/dev/full")
    )
    caught = []

    def write():
        try:
            recorder = Recorder(tmp_path, 0, COLUMNS)
            for step in range(1, 2000):
                recorder.write(row(step))
            recorder.close()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and len(caught) == 1
    with pytest.raises(
        WorkdirError, match="tensorboard: cannot be written: .*No space left on device"
    ):
        raise caught[0]


def test_an_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    with pytest.raises(WorkdirError, match="tensorboard: cannot be written"):
        Recorder(tmp_path, 0, COLUMNS)
