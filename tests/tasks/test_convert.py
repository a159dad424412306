"""Tests for the task `convert`: log, store and errors."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.store import Store, is_store
from mlip_jax.defaults import convert_defaults
from mlip_jax.tasks import convert
from mlip_jax.workdir import WorkdirError, claimed

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "data" / "gfn2_small.hdf5"


def command(workdir, **changes):
    """Run the command and return its exit code and output, with white space folded."""
    fields = {"data.path": DATA, "store.num_processes": 1} | {
        k.replace("__", "."): v for k, v in changes.items()
    }
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "mlip_jax.main",
            f"--config={REPOSITORY}/configs/convert.py",
            f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in fields.items()),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=workdir.parent,
        env=dict(os.environ, GLIBC_TUNABLES="", PYTHONPATH=str(REPOSITORY), COLUMNS="200"),
    )
    return process.returncode, " ".join((process.stdout + process.stderr).split())


def run(workdir, **changes):
    """Run the task in this process."""
    config = convert_defaults()
    config.data.path, config.store.num_processes = str(DATA), 1
    for name, value in changes.items():
        part, field = name.split("__")
        config[part][field] = value
    return convert.run(config, workdir)


def edited(path, change):
    """Write a copy of the data set with `change` applied to every group."""
    shutil.copy(DATA, path)
    with h5py.File(path, "a") as file:
        for group in file.values():
            change(group)
    return path


def gradients_negated(group):
    group["dft_total_gradient"][...] = -group["dft_total_gradient"][...]


def times(folder):
    return {
        p.name: p.stat().st_mtime_ns
        for p in Path(folder).rglob("*")
        if p.suffix in (".safetensors", ".npy")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Workdir and output of a conversion of the neutral molecules."""
    workdir = tmp_path_factory.mktemp("finished") / "store"
    code, output = command(workdir, data__charge=0.0, store__atoms_per_shard=100)
    assert code == 0, output
    return workdir, output


def test_the_log_summarizes_the_conversion(finished):
    workdir, output = finished
    assert "90 structures of 15 molecules (GFN2-xTB" in output
    assert "skipped by the reader: none; removed by filters: {'charge': 12}" in output
    assert "90 structures, 792 atoms; without energy 0, without forces 0" in output
    assert "net force" in output and "17/17 records" in output
    assert "Traceback" not in output and str(workdir) in output


def test_the_workdir_is_a_store_with_checks(finished):
    workdir, _ = finished
    store = Store(workdir)
    store.verify()
    assert len(store) == 90 and not np.asarray(store.index("charge")).any()
    assert len(store.manifest["shards"]) > 5 and store.manifest["dtype"] == "float32"
    text = (workdir / "checks.md").read_text()
    assert text.startswith("## Checks") and "90 structures, 792 atoms" in text
    assert "| shortest distance | Å | 90 |" in text
    for problem in store.manifest["problems"]:
        assert problem["message"] in text
    removed = (workdir / "removed.csv").read_text().splitlines()
    assert removed[0] == "structure,reason" and len(removed) == 13
    assert all(line.endswith(",charge") for line in removed[1:])
    assert {line.split("#")[0] for line in removed[1:]} == {
        f"{DATA.name}:acetate",
        f"{DATA.name}:ethylammonium",
    }


def test_other_number_of_processes_is_accepted(finished):
    workdir, first = finished
    before = times(workdir)
    code, output = command(
        workdir, data__charge=0.0, store__atoms_per_shard=100, store__num_processes=2
    )
    assert code == 0 and "90 structures of 15 molecules (GFN2-xTB" in output, output
    assert times(workdir) == before and "records" not in output


def test_other_filters_are_an_error_with_the_difference(finished):
    workdir, _ = finished
    code, output = command(workdir, data__charge=0.0, store__atoms_per_shard=100, data__max_atoms=9)
    assert code != 0 and "data.max_atoms: None -> 9" in output and "Traceback" not in output
    assert "charge" not in output.partition("another config:")[2] and "--workdir" in output
    for name, value, line in (
        ("data__charge", 1.0, "data.charge: 0.0 -> 1.0"),
        ("data__elements", ("H",), "elements"),
        ("store__dtype", "float64", "store.dtype: 'float32' -> 'float64'"),
    ):
        with pytest.raises(WorkdirError, match=line):
            run(workdir, **{"data__charge": 0.0, "store__atoms_per_shard": 100} | {name: value})
    assert is_store(workdir)


def test_a_truncated_file_is_an_error_with_one_message(tmp_path):
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(DATA.read_bytes()[:40_000])
    code, output = command(tmp_path / "store", data__path=cut, data__reader="spice")
    assert code != 0 and "Traceback" not in output and output.count("error:") == 1
    assert "cut.hdf5: cannot be opened as HDF5 (40000 bytes" in output and "download" in output


def test_rejected_data_can_be_converted_with_a_flag(tmp_path):
    """The flag that the message suggests works in the same workdir."""
    source = edited(tmp_path / "wrong.hdf5", gradients_negated)
    code, output = command(tmp_path / "store", data__path=source)
    assert code != 0 and "Traceback" not in output and output.count("error:") == 1
    assert (
        "wrong.hdf5: rejected" in output
        and "look like gradients" in output
        and "change their sign" in output
    )
    way_out = "--config.data.reject_invalid=False"
    assert way_out in output and not is_store(tmp_path / "store")
    code, output = command(tmp_path / "store", data__path=source, data__refuse=False)
    assert code == 0 and "102 structures" in output and "error: these look like gradients" in output
    assert "**error** (gradients)" in (tmp_path / "store" / "checks.md").read_text()


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"data__path": "nowhere.hdf5"}, DatasetError, "nowhere.hdf5: no such file"),
        ({"data__path": "*.nothing"}, DatasetError, "no file matches this pattern"),
        (
            {"data__path": str(Path(__file__))},
            DatasetError,
            "layout of any known data set.*config.data.reader",
        ),
        ({"data__reader": "spise"}, ConfigError, "Did you mean 'spice'"),
        (
            {"data__reader_options": "split=1"},
            ConfigError,
            "'spice' has no options; received 'split'",
        ),
        (
            {"data__require": "everything"},
            ConfigError,
            "unknown data.require 'everything'.*energy, forces",
        ),
        ({"data__elements": ("Xx",)}, ValueError, "'Xx' is not the symbol"),
        (
            {"data__max_atoms": 2},
            DatasetError,
            "all 102 structures are excluded .*'too many atoms': 102",
        ),
        (
            {"store__dtype": "float16"},
            ConfigError,
            "unknown store.dtype 'float16'.*float32, float64",
        ),
    ],
)
def test_invalid_settings_are_errors(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        run(tmp_path / "store", **changes)
    assert not is_store(tmp_path / "store")


def test_skipped_and_filtered_structures_are_counted_separately(tmp_path, caplog):
    def lost(group):
        if len(group["atomic_numbers"]) == 6:
            group["conformations"][0, 0] = np.nan

    caplog.set_level(logging.INFO)
    run(
        tmp_path / "store", data__path=str(edited(tmp_path / "data.hdf5", lost)), data__max_atoms=10
    )
    assert (
        "skipped by the reader: {'positions not finite': 1}; removed by filters: {'too many atoms': 12}"
        in caplog.text
    )
    assert "89 structures of 15 molecules" in caplog.text


def test_reader_options_and_dtype(tmp_path):
    frames = tmp_path / "frames.xyz"
    frames.write_text(
        "".join(
            f'2\nProperties=species:S:1:pos:R:3:grad:R:3 total={-1.0 - s} name=m{s % 2} pbc="F F F"\n'
            f"H 0 0 0 0 0 {s}\nC 0 0 1.0 0 0 {-s}\n"
            for s in range(4)
        )
    )
    workdir = run(
        tmp_path / "store",
        data__path=str(frames),
        data__refuse=False,
        store__dtype="float64",
        data__reader_options="energy_key=total; forces_key=grad; energy_unit=hartree; "
        "forces_are_gradients=True; molecule_key=name",
    )
    store = Store(workdir)
    np.testing.assert_allclose(
        store.index("energy"), 27.211386 * np.array([-1.0, -2, -3, -4]), rtol=1e-6
    )
    np.testing.assert_allclose(store.take([3]).forces[0], [0, 0, -3 * 27.211386], rtol=1e-6)
    assert store.manifest["dtype"] == "float64" and store.manifest["molecules"] == 2
    assert store.manifest["source"]["options"]["forces_are_gradients"] is True


def test_one_run_at_a_time(tmp_path):
    with claimed(tmp_path / "store", {}):
        with pytest.raises(WorkdirError, match=f"another run \\(process {os.getpid()}\\)"):
            run(tmp_path / "store")
    assert not is_store(tmp_path / "store")


def test_found_in_the_directory(tmp_path):
    shutil.copy(DATA, tmp_path / "SPICE-small.hdf5")
    store = Store(run(tmp_path / "store", data__path=None, data__directory=str(tmp_path)))
    assert store.manifest["source"]["files"][0]["name"] == "SPICE-small.hdf5" and len(store) == 102
