"""Tests for the journal: results survive a crash at any byte and are stored once."""

import csv
import errno
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.simulation.relaxation import journal as relax_journal
from mlip_jax.simulation.relaxation.journal import (
    Indices,
    Journal,
    JournalError,
    Layout,
    finished,
    read_part,
)
from mlip_jax.simulation.relaxation.merge import merge, read_pieces
from mlip_jax.simulation.relaxation.progress import RelaxationProgressBar

LAYOUT = Layout(("index", "name", "value"), ("xyz", "sdf"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip syncing: these processes end, but the machine does not."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def result(index):
    """Return cells and pieces of several lengths, including empty ones."""
    name = ["plain", 'a "quoted", name', "two\nlines", "", "üñí 分子\u2028x\0", "a\\b"][index % 6]
    pieces = {
        "xyz": f"<xyz {index}>\n".encode() * (index % 4),
        "sdf": f"<sdf {index}>".encode() * (index % 3 == 1),
    }
    return [index, name, index / 7], pieces


def fill(folder, part, indices):
    with Journal(folder, part, LAYOUT) as journal:
        for index in indices:
            journal.add(*result(index))


def merged(folder, out, **options):
    """Return the rows of results.csv, and the pieces."""
    out.mkdir(exist_ok=True)
    merge(
        folder, LAYOUT, out / "results.csv", {k: out / f"all.{k}" for k in LAYOUT.kinds}, **options
    )
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert sorted(p.name for p in out.iterdir()) == ["all.sdf", "all.xyz", "results.csv"]
    return rows, (out / "all.xyz").read_bytes(), (out / "all.sdf").read_bytes()


def expected(indices):
    rows = [list(LAYOUT.columns)]
    for index in indices:
        cells, _ = result(index)
        name = " ".join("".join(c if c.isprintable() else " " for c in cells[1]).split())
        rows.append([str(index), name, repr(index / 7)])
    return rows, *(b"".join(result(i)[1][kind] for i in indices) for kind in LAYOUT.kinds)


def test_all_parts_in_order(tmp_path):
    fill(tmp_path / "parts", 0, [4, 0, 2])
    fill(tmp_path / "parts", 1, [5, 3])
    fill(tmp_path / "parts", 10, [1])
    assert merged(tmp_path / "parts", tmp_path / "out") == expected(range(6))
    done = finished(tmp_path / "parts", LAYOUT)
    assert len(done) == 6 and all(i in done for i in range(6)) and 6 not in done and -1 not in done
    assert read_pieces(tmp_path / "parts", LAYOUT, "xyz", [3, 4, 5, 99]) == {
        3: result(3)[1]["xyz"],
        5: result(5)[1]["xyz"],
    }
    assert merged(tmp_path / "parts", tmp_path / "out", stop=3) == expected(range(3))


def test_duplicate_results_are_merged(tmp_path):
    fill(tmp_path, 0, [1, 0])
    fill(tmp_path, 1, [2, 1])
    assert merged(tmp_path, tmp_path / "out") == expected(range(3))


def test_empty_journal(tmp_path):
    assert len(finished(tmp_path, LAYOUT)) == 0
    assert merged(tmp_path / "none", tmp_path / "out") == expected([])


def test_numbers_keep_their_digits_and_unknown_ones_are_empty(tmp_path):
    with Journal(tmp_path, 0, LAYOUT) as journal:
        journal.add([0, None, -40123.12345678901])
        journal.add([1, "x", float("nan")])
        journal.add([2, "x", np.float32(0.1)])
        journal.add([3, "x", float("inf")])
    rows, *_ = merged(tmp_path, tmp_path / "out")
    assert [r[1:] for r in rows[1:]] == [
        ["", "-40123.12345678901"],
        ["x", ""],
        ["x", repr(float(np.float32(0.1)))],
        ["x", "inf"],
    ]


def test_truncation_at_every_byte_of_the_last_results(tmp_path):
    """Truncate any of the files: valid results are kept, the rest is recomputed."""
    whole = tmp_path / "whole"
    fill(whole, 0, range(9))
    lines = list(read_part(whole / "part-0.csv", LAYOUT))
    files = {"csv": lines[6].start, "xyz": lines[6].pieces[0][0], "sdf": lines[6].pieces[1][0]}
    cuts = 0
    for kind, first in files.items():
        for cut in range(first, (whole / f"part-0.{kind}").stat().st_size + 1):
            folder = tmp_path / "cut"
            shutil.copytree(whole, folder)
            os.truncate(folder / f"part-0.{kind}", cut)
            done = finished(folder, LAYOUT)
            assert 6 <= len(done) <= 9 and all(i in done for i in range(len(done)))
            with Journal(folder, 0, LAYOUT) as journal:
                assert journal.count == len(done)
                for index in range(len(done), 9):
                    journal.add(*result(index))
            for name in ("part-0.xyz", "part-0.sdf"):
                assert (folder / name).read_bytes() == (whole / name).read_bytes()
            assert [line.cells[:3] for line in read_part(folder / "part-0.csv", LAYOUT)] == [
                line.cells[:3] for line in lines
            ]
            shutil.rmtree(folder)
            cuts += 1
    assert cuts > 150


def test_truncation_within_the_header(tmp_path):
    fill(tmp_path, 0, [0])
    size = len(",".join(LAYOUT.header)) + 1
    for cut in range(size + 1):
        os.truncate(tmp_path / "part-0.csv", cut)
        assert len(finished(tmp_path, LAYOUT)) == 0
        fill(tmp_path, 0, [1])
        assert merged(tmp_path, tmp_path / "out") == expected([1])


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.floats(0, 1), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_repeated_kills(tmp_path_factory, runs, data):
    """Each start loses the end of any of its files; garbage may follow."""
    folder = tmp_path_factory.mktemp("parts")
    for count, shares in runs:
        done = finished(folder, LAYOUT)
        part = data.draw(st.integers(0, 2))
        with Journal(folder, part, LAYOUT) as journal:
            for index in [i for i in range(40) if i not in done][:count]:
                journal.add(*result(index))
        for kind, share in zip(("csv", "xyz", "sdf"), shares):
            path = folder / f"part-{part}.{kind}"
            header = len(",".join(LAYOUT.header)) + 1 if kind == "csv" else 0
            os.truncate(path, header + round(share * (path.stat().st_size - header)))
            if kind == "csv" or share == 1:
                with open(path, "ab") as file:
                    file.write(
                        data.draw(
                            st.sampled_from(
                                [b"", b"\0\0\0", b"7,x", b"\n", b"\xff\n", b"1,2,3,4,5,6,7,8\n"]
                            )
                        )
                    )
    done = finished(folder, LAYOUT)
    fill(folder, 0, [i for i in range(40) if i not in done])
    assert merged(folder, folder / "out") == expected(range(40))


def test_lines_of_zeros_after_a_crash_of_the_machine(tmp_path):
    fill(tmp_path, 0, range(4))
    lines = list(read_part(tmp_path / "part-0.csv", LAYOUT))
    with open(tmp_path / "part-0.csv", "r+b") as file:
        file.seek(lines[2].start)
        file.write(bytes(lines[2].stop - lines[2].start))
    fill(tmp_path, 0, [3, 2])
    assert merged(tmp_path, tmp_path / "out") == expected(range(4))


def test_results_are_on_the_disk_within_seconds(tmp_path):
    with Journal(tmp_path, 0, LAYOUT) as journal:
        journal.add(*result(7))
        deadline = time.monotonic() + 10
        while 7 not in finished(tmp_path, LAYOUT):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (tmp_path / "part-0.xyz").read_bytes() == result(7)[1]["xyz"]


def test_large_results_do_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(relax_journal, "FLUSH_SECONDS", 1000)
    monkeypatch.setattr(relax_journal, "MAX_WAITING_BYTES", 1000)
    with Journal(tmp_path, 0, LAYOUT) as journal:
        journal.add([0, "", 0], {"xyz": b"x" * 999})
        assert 0 not in finished(tmp_path, LAYOUT)
        journal.add([1, "", 0], {"xyz": b"x" * 999})
        assert 0 in finished(tmp_path, LAYOUT)


def test_full_disk(tmp_path, monkeypatch):
    """The error is clear, recorded results stay, and a second try finds all."""
    write = os.pwrite

    def full(file, data, offset):
        if offset + len(data) <= 60:
            return write(file, data, offset)
        if offset < 60:
            return write(file, data[: 60 - offset], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(tmp_path, 0, [3])
    journal = Journal(tmp_path, 0, LAYOUT)
    monkeypatch.setattr(os, "pwrite", full)
    journal.add([0, "", 0], {"xyz": b"x" * 100})
    with pytest.raises(JournalError, match="No space left on device. Recorded: 1 molecule. Fix"):
        journal.close()
    monkeypatch.undo()
    assert len(finished(tmp_path, LAYOUT)) == 1
    fill(tmp_path, 0, [0, 1, 2])
    assert merged(tmp_path, tmp_path / "out") == expected(range(4))


def test_temporarily_full_disk_loses_nothing(tmp_path, monkeypatch):
    failed = []

    def full(*_):
        failed.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    def wait_for(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    monkeypatch.setattr(relax_journal, "FLUSH_SECONDS", 0.05)
    with Journal(tmp_path, 0, LAYOUT) as journal:
        with monkeypatch.context() as m:
            m.setattr(os, "pwrite", full)
            journal.add(*result(0))
            wait_for(lambda: len(failed) > 1)  # the first error has been recorded
            with pytest.raises(JournalError, match="No space left"):
                journal.add(*result(1))
        wait_for(lambda: 0 in finished(tmp_path, LAYOUT))
        journal.add(*result(1))
    assert merged(tmp_path, tmp_path / "out") == expected(range(2))


def test_the_first_error_is_raised(tmp_path, monkeypatch):
    with pytest.raises(KeyError):
        with Journal(tmp_path, 0, LAYOUT) as journal:
            journal.add(*result(0))
            monkeypatch.setattr(
                os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
            )
            raise KeyError("x")


@pytest.mark.parametrize("error", [SystemExit(75), KeyboardInterrupt()])
def test_signals_keep_results(tmp_path, monkeypatch, error):
    monkeypatch.setattr(relax_journal, "FLUSH_SECONDS", 1000)
    with pytest.raises(type(error)):
        with Journal(tmp_path, 0, LAYOUT) as journal:
            journal.add(*result(5))
            raise error
    assert 5 in finished(tmp_path, LAYOUT)


def test_signal_within_a_write(tmp_path, monkeypatch):
    """After an exception anywhere in a write, closing writes the same again."""
    monkeypatch.setattr(relax_journal, "FLUSH_SECONDS", 1000)
    calls = {"pwrite": os.pwrite, "fsync": os.fsync}
    for stop in range(1, 7):
        folder, left = tmp_path / str(stop), [stop]

        def interrupted(name, left=left):
            def call(*arguments):
                left[0] -= 1
                if left[0] == 0:
                    raise SystemExit(75)
                result = calls[name](*arguments)
                return result

            return call

        with pytest.raises(SystemExit):
            with Journal(folder, 0, LAYOUT) as journal:
                for index in range(2):
                    journal.add(*result(index))
                with monkeypatch.context() as m:
                    for name in calls:
                        m.setattr(os, name, interrupted(name))
                    m.setattr(relax_journal, "MAX_WAITING_BYTES", 0)
                    journal.add(*result(2))
        assert merged(folder, folder / "out") == expected(range(3)), stop


def test_parts_in_use_or_with_other_columns(tmp_path):
    with Journal(tmp_path, 0, LAYOUT), pytest.raises(JournalError, match="another process"):
        Journal(tmp_path, 0, LAYOUT)
    for use in (
        lambda layout: Journal(tmp_path, 0, layout),
        lambda layout: finished(tmp_path, layout),
    ):
        with pytest.raises(JournalError, match="another version"):
            use(Layout(("index", "other"), ("xyz",)))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(tmp_path / "file", 0, LAYOUT)


def test_failed_merge_keeps_earlier_files(tmp_path, monkeypatch):
    fill(tmp_path, 0, range(3))
    before = merged(tmp_path, tmp_path / "out")
    fill(tmp_path, 0, range(3, 5))
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    with pytest.raises(JournalError, match="No space left.*They still exist"):
        merge(
            tmp_path,
            LAYOUT,
            tmp_path / "out/results.csv",
            {k: tmp_path / f"out/all.{k}" for k in LAYOUT.kinds},
        )
    monkeypatch.undo()
    assert (tmp_path / "out/all.xyz").read_bytes() == before[1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "all.sdf",
        "all.xyz",
        "results.csv",
    ]


def test_time_is_that_of_the_longest_part(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(relax_journal.time, "monotonic", lambda: clock[0])
    for part, steps in enumerate(([1.0, 2.0], [5.0])):
        with Journal(tmp_path, part, LAYOUT) as journal:
            clock[0] += 100  # loading, which does not count for a molecule
            journal.start_clock()
            for i, step in enumerate(steps):
                clock[0] += step
                journal.add([10 * part + i, "", 0])
    assert merge(tmp_path, LAYOUT, Path(tmp_path / "r.csv"), {}) == 5.0


def test_indices():
    indices = Indices()
    for i in (5, 5, 0, 100_000):
        indices.add(i)
    assert (
        len(indices) == 3
        and [i for i in range(100_100) if i in indices] == [0, 5, 100_000]
        and 10**9 not in indices
    )


def test_an_index_of_any_size_takes_little_memory(tmp_path):
    """A line of other people with the index 10¹¹ took 100 GB."""
    indices = Indices()
    indices.add(10**18)
    indices.add(10**18)
    assert 10**18 in indices and len(indices) == 1 and 5 not in indices
    fill(tmp_path / "parts", 0, [3, 10**11])
    assert len(finished(tmp_path / "parts", LAYOUT)) == 2
    text = (tmp_path / "parts/part-0.csv").read_text()
    (tmp_path / "parts/part-0.csv").write_text(text.replace(f"{10**11}", f"{10**19}"))
    assert len(finished(tmp_path / "parts", LAYOUT)) == 1


def test_a_long_name_is_cut(tmp_path):
    """Python reads no cells of more than 131,072 characters: the results after it were lost."""
    with Journal(tmp_path / "parts", 0, LAYOUT) as journal:
        journal.add([0, "n" * 200_000, 0.5], {"xyz": b"", "sdf": b""})
        journal.add(*result(1))
    assert len(finished(tmp_path / "parts", LAYOUT)) == 2
    rows, *_ = merged(tmp_path / "parts", tmp_path / "out")
    assert len(rows) == 3 and rows[1][1].startswith("nnn") and rows[1][1].endswith("…")


def test_failures_of_earlier_starts_are_counted_once(tmp_path):
    layout = Layout(("index", "status"), ())
    for part in (0, 1):
        with Journal(tmp_path, part, layout) as journal:
            for index, status in enumerate(("failed", "converged", "diverged", "step limit")):
                journal.add([index, status])
    assert relax_journal.count_failures(tmp_path, layout) == 2
    assert relax_journal.count_failures(tmp_path, layout, lambda index: index > 0) == 1
    progress = RelaxationProgressBar(9, 4, failed=2)
    progress.add("failed")
    assert "3 failed or diverged" in progress.text()
    relax_journal.check_any_succeeded(tmp_path, layout, 4, tmp_path / "results.csv")
    with pytest.raises(RuntimeError, match="all 2 molecules .*results.csv"):
        relax_journal.check_any_succeeded(tmp_path, layout, 2, tmp_path / "results.csv")
