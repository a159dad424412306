"""Tests that corrupted files raise DatasetError, and cause no access outside of their folder.

`make fuzz` runs `fuzz.py`, which corrupts many more files. These tests use one process for all.
"""

import os
import shutil
import signal

import numpy as np
import pytest

from tests.hostile import fuzz, mutation

SEEDS = 20
# files of these readers are opened in much less than a second
QUICK = ("ani", "md17", "npz", "pubchemqcr", "spice")


@pytest.mark.parametrize("name", QUICK)
def test_corrupted_files_are_data_errors(tmp_path, name):
    """Detects an AttributeError or similar after a download that changed a byte."""
    path, options = mutation.sample(name, tmp_path)
    for seed in range(SEEDS):
        copy = mutation.copy_damaged(path, tmp_path / "copy", np.random.default_rng(seed))
        mutation.read(copy, name, options)


@pytest.mark.parametrize("name", ["checkpoint", "geom", "molecule3d", "store"])
def test_pipes_in_folders_are_not_opened(tmp_path, name):
    """Detects an endless wait for the writer of a named pipe in a folder of other people."""
    folder, options = mutation.sample(name, tmp_path)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())

    def stop(*_):
        raise mutation.ForbiddenAction("waits for a pipe")

    signal.signal(signal.SIGALRM, stop)
    for number, file in enumerate(files):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy)
        (copy / file).unlink()
        os.mkfifo(copy / file)
        signal.alarm(10)
        mutation.read(copy, name, options)
        signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.NAMES)
def test_corrupted_files_do_not_end_the_process(name):
    problems, count = fuzz.problems_of(name, seconds=60, seed=1000)
    assert not problems and count


@pytest.mark.slow
def test_actions_outside_are_reported(tmp_path):
    """The hook ends a process that writes elsewhere or opens a connection."""
    child = os.fork()
    if not child:
        mutation.forbid_outside(tmp_path)
        try:
            open(tmp_path.parent / "elsewhere", "w")
        except mutation.ForbiddenAction:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
