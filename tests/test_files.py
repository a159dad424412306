"""Tests for files.py: links in an output folder never redirect what a run writes."""

import os

import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax import files, workdir
from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.datasets.builtin.storage import Parts
from mlip_jax.datasets.store import conversion
from mlip_jax.simulation.dynamics import trajectories
from mlip_jax.simulation.reference.result_cache import ResultCache
from mlip_jax.simulation.relaxation.journal import Journal, JournalError, Layout
from mlip_jax.simulation.relaxation.merge import merge
from mlip_jax.sweeps import attempts, child_process


def claim(folder):
    with workdir.claimed(folder, {"seed": 0}):
        pass


def lock_conversion(folder):
    with conversion.lock_folder(folder):
        pass


def lock_sweep(folder):
    with attempts.lock_folder(folder, wait=False):
        pass


def generate(folder):
    with Parts(folder / "generated.hdf5", {}):
        pass


def append_frames(folder):
    frames = [Atoms("H", info={"step": 0, "time_fs": 0.0})]
    trajectories.FORMS["extxyz"].append(folder / "0.xyz", frames)


def append_hdf5(folder):
    frame = Atoms("H", info={"step": 0, "time_fs": 0.0})
    frame.calc = SinglePointCalculator(frame, energy=0.0)
    trajectories.FORMS["hdf5"].append(folder / "0.h5", [frame])


# Writers, and the names in their folder that they use.
WRITERS = {
    "workdir": (claim, ".lock", ".config.json.tmp", "config.json"),
    "conversion": (lock_conversion, ".conversion.lock"),
    "sweep": (lock_sweep, attempts.LOCK),
    "log": (lambda f: child_process.run_logged([], f / "log", None), "log"),
    "generation": (generate, "generated.hdf5.parts/lock"),
    "journal": (lambda f: Journal(f, 0, Layout((), ("xyz",))), "part-0.csv", "part-0.xyz"),
    "results": (lambda f: ResultCache(f / "results"), "results"),
    "trajectory": (append_frames, "0.xyz"),
    "hdf5": (append_hdf5, "0.h5"),
    "truncation": (lambda f: trajectories.FORMS["extxyz"].truncate(f / "0.xyz", 1), "0.xyz"),
}


@pytest.mark.parametrize(
    "writer, name", [(writer, name) for writer, (_, *names) in WRITERS.items() for name in names]
)
def test_no_writer_follows_a_link(tmp_path, writer, name):
    """Detects a file of the user that is truncated or written through a link of other people."""
    precious, folder = tmp_path / "precious.txt", tmp_path / "folder"
    precious.write_text('{"seed": 0}')  # valid, so that only the link is a reason to reject it
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(precious)
    try:
        WRITERS[writer][0](folder)
    except (OSError, RuntimeError) as error:
        assert "symbolic link" in str(error)
    assert precious.read_text() == '{"seed": 0}'


def test_folders_within_an_output_folder_are_not_links(tmp_path):
    """Detects the removal of the user's files through the link of a folder that a run cleans."""
    precious = tmp_path / "home" / "1" / "file"
    precious.parent.mkdir(parents=True)
    precious.touch()
    (tmp_path / "generated.hdf5.parts").symlink_to(precious.parents[1])
    (tmp_path / "checkpoints").symlink_to(precious.parents[1])
    for write in (generate, lambda folder: CheckpointStore(folder / "checkpoints")):
        with pytest.raises(OSError, match="symbolic link"):
            write(tmp_path)
    assert precious.exists()


def test_folders_below_an_output_folder_are_not_links(tmp_path):
    """Detects a run in the folder of a link, one level below: workdir/runs/name."""
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/runs").symlink_to(tmp_path / "home")
    with pytest.raises(OSError, match="runs.*symbolic link|symbolic link.*runs"):
        files.make_subfolder(tmp_path / "run/runs/name", tmp_path / "run")
    (tmp_path / "link").symlink_to("run")  # the user's own link to the output folder
    assert files.make_subfolder(tmp_path / "link/a/b", tmp_path / "link").is_dir()
    with pytest.raises(OSError, match="symbolic link"):
        child_process.run_logged([], tmp_path / "run/runs/log.txt", None)


def test_content_is_not_copied_through_links(tmp_path):
    """A run that is resumed copied private files of the user to results, which are then shared."""
    (tmp_path / "private").write_text("secret")
    (tmp_path / "1.xyz").symlink_to("private")
    (tmp_path / "0.xyz").write_text("own")
    files.write_joined(tmp_path / "all.xyz", [tmp_path / "0.xyz", tmp_path / "missing.xyz"])
    assert (tmp_path / "all.xyz").read_text() == "own"
    with pytest.raises(OSError, match="symbolic link"):
        files.write_joined(tmp_path / "all.xyz", [tmp_path / "0.xyz", tmp_path / "1.xyz"])
    assert (tmp_path / "all.xyz").read_text() == "own"


@pytest.mark.parametrize("name", ["part-0.csv", "part-0.xyz"])
def test_parts_of_a_journal_are_not_read_through_links(tmp_path, name):
    layout = Layout(("index",), ("xyz",))
    with Journal(tmp_path / "parts", 0, layout) as journal:
        journal.add([0], {"xyz": b"frame"})
    (tmp_path / "parts" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "parts" / name).symlink_to("../elsewhere")
    with pytest.raises(JournalError, match="symbolic link"):
        merge(tmp_path / "parts", layout, tmp_path / "results.csv", {"xyz": tmp_path / "all.xyz"})
    assert not (tmp_path / "all.xyz").exists()


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(workdir.WorkdirError, match="is a pipe or a device"):
        claim(tmp_path)


def test_a_lock_with_a_second_name_keeps_its_content(tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    os.link(tmp_path / "precious.txt", tmp_path / ".lock")
    claim(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "precious"


def test_the_temporary_file_of_a_shared_file_cannot_be_predicted(tmp_path):
    names = set()
    for _ in range(2):
        with files.atomic_path(tmp_path / "file", shared=True) as temporary:
            names.add(temporary.name)
    assert len(names) == 2
