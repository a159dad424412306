"""Tests for atomic file replacement: a file has its old or its new content after any failure."""

import contextlib
import json
import os
import socket
import subprocess

import pytest

from mlip_jax.workdir import (
    WorkdirError,
    atomic_open,
    atomic_path,
    check_origin,
    claimed,
    has_results,
    unused_workdir,
    write_json,
    write_text,
)


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, shared):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_open(path, "w", shared=shared) as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_content_is_on_disk_before_it_replaces_the_file(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *paths: (calls.append(("replace", 3)), replace(*paths))
    )
    write_text(tmp_path / "file.txt", "new")
    assert calls == [("fsync", 3), ("replace", 3)]


def test_a_leftover_of_a_killed_process_is_replaced(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_path(path) as temporary:
        leftover = temporary
        temporary.write_text("new")
    leftover.write_text("half of a longer content")
    write_text(path, "newer")
    assert path.read_text() == "newer" and os.listdir(tmp_path) == ["file.txt"]


def test_processes_that_share_a_file_have_separate_temporary_files(tmp_path, monkeypatch):
    path, names = tmp_path / "file.txt", []
    for host, process in (("a", 1), ("a", 2), ("b", 1)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        with atomic_path(path, shared=True) as temporary:
            temporary.touch()
            names.append(temporary.name)
    assert len(set(names)) == 3


def test_json_is_written_whole_or_not_at_all(tmp_path):
    """Detects files written in place, which an error, a kill or a full disk leaves incomplete."""
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": 2, "not JSON": object()})
    assert json.loads(path.read_text()) == {"step": 1}


def test_a_run_can_be_continued_with_more_steps_and_nothing_else(tmp_path):
    def start(steps, seed=0):
        with claimed(tmp_path, {"seed": seed, "train": {"num_steps": steps}}, ["train.num_steps"]):
            (tmp_path / "results").touch()

    start(10)
    start(20)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["num_steps"] == 20
    for other in (lambda: start(10), lambda: start(30, seed=1)):
        with pytest.raises(WorkdirError, match="another config"):
            other()
    start(20)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_run_that_ends_before_its_first_result_releases_the_workdir(tmp_path, error):
    """Detects a config that remains after a signal in the first seconds and rejects a corrected one."""
    mistyped, corrected = ({"task": "relax", "input": path} for path in ("a", "b"))
    with pytest.raises(error), claimed(tmp_path, mistyped):
        raise error
    with claimed(tmp_path, corrected):
        (tmp_path / "results").write_text("1")
    with pytest.raises(SystemExit), claimed(tmp_path, corrected):
        raise SystemExit
    with pytest.raises(WorkdirError, match="another config"), claimed(tmp_path, mistyped):
        pass


def test_files_of_the_user_survive_a_run_that_fails(tmp_path):
    """Detects the removal of files that the run has not written, such as a copied split."""
    for name, text in (("splits.npz", "1"), ("one.csv", "a,b\n"), ("__init__.py", "")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError), claimed(tmp_path, {"task": "relax"}):
        (tmp_path / "results.csv").write_text("index,energy\n")
        raise ValueError
    assert {*os.listdir(tmp_path)} == {".lock", "splits.npz", "one.csv", "__init__.py"}


def test_a_table_of_one_smiles_is_not_a_preparation(tmp_path):
    """Detects a file of molecules without a header that counts as the rest of an interrupted start."""
    (tmp_path / "smiles.csv").write_text("CCO\n")
    with contextlib.suppress(KeyboardInterrupt), claimed(tmp_path, {"task": "relax", "input": "a"}):
        raise KeyboardInterrupt
    with contextlib.suppress(WorkdirError), claimed(tmp_path, {"task": "relax", "input": "b"}):
        pass
    assert (tmp_path / "smiles.csv").exists()


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """Detects temporary files that accumulate if processes are killed while they write shared files."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [
        f".part[0].npz.{host}.{process}.0123456789abcdef.tmp"
        for host, process in (
            (socket.gethostname(), ended.pid),
            (socket.gethostname(), os.getppid()),
            ("other", 1),
        )
    ]
    for name in names:
        (tmp_path / name).touch()
    write_text(tmp_path / "part[0].npz", "", shared=True)
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "part[0].npz"])


def test_a_start_without_results_does_not_block_the_workdir(tmp_path):
    """Detects files of an interrupted start that block, or end up in, the run that replaces it."""

    def start(path, *files):
        config = {"task": "train", "data": {"path": path}}
        with contextlib.suppress(KeyboardInterrupt), claimed(tmp_path, config):
            for file, text in files:
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_text(text)
            raise KeyboardInterrupt

    start(
        "a",
        ("splits.npz", "a"),
        ("metrics.csv", "step,loss\n"),
        ("3.orbax-checkpoint-tmp-0/x", "a"),
    )
    assert json.loads((tmp_path / "config.json").read_text())["data"] == {"path": "a"}
    start("b")
    assert not (tmp_path / "splits.npz").exists() and not (tmp_path / "metrics.csv").exists()
    start("b", ("metrics.csv", "step,loss\n1,0.5\n"))
    with pytest.raises(WorkdirError, match=rf"path: 'b' -> 'c'(?s:.*)--workdir={tmp_path}-2"):
        start("c")


def test_a_config_that_is_not_of_a_run_is_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"of": "another program"}')
    with pytest.raises(WorkdirError, match="another config"), claimed(tmp_path, {"task": "train"}):
        pass
    assert "another program" in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("text", ["[]", "7", "null", '{"task": []}', "[" * 5000, "9" * 5000])
def test_another_kind_of_json_is_an_error(tmp_path, text):
    """A folder of other people can contain any config.json; errors such as KeyError had no remedy."""
    config = {"task": "train"}
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "results.csv").write_text("index\n1\n")
    with pytest.raises(WorkdirError, match="Choose another"), claimed(tmp_path, config):
        pass
    unused_workdir(tmp_path, config)
    with pytest.raises(WorkdirError, match="Choose another --workdir"):
        check_origin(tmp_path / "config.json", config, "results")


@pytest.mark.parametrize("name", ["table.csv", "part/metrics.csv", "log.txt"])
def test_pipes_in_a_workdir_are_rejected(tmp_path, name):
    """The opening of a pipe never ends, and reading of a link to /dev/zero takes all memory."""
    (tmp_path / "part").mkdir()
    os.mkfifo(tmp_path / name)
    has_results(tmp_path)
    with pytest.raises(WorkdirError, match="a pipe or a device"), claimed(tmp_path, {"task": "md"}):
        pass
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    has_results(tmp_path)
    with pytest.raises(WorkdirError, match="a pipe or a device"), claimed(tmp_path, {"task": "md"}):
        pass


def test_the_default_workdir_is_the_first_without_another_run(tmp_path):
    """Detects a second input that is rejected, and a rerun that does not resume."""

    def start(given, steps=1):
        config = {"task": "relax", "input": given, "train": {"num_steps": steps}}
        folder = unused_workdir(tmp_path / "relax", config, ["train.num_steps"])
        with claimed(folder, config, ["train.num_steps"]):
            (folder / "results").write_text("results")
            assert unused_workdir(tmp_path / "relax", config | {"input": "x"}) != folder  # in use
        return folder.name

    assert [start(name) for name in "abac"] == ["relax", "relax-2", "relax", "relax-3"]
    assert start("b", steps=2) == "relax-2"
    # the task itself reports a folder of another task
    assert unused_workdir(tmp_path / "relax", {"task": "md"}) == tmp_path / "relax"
