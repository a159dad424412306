"""Tests for conversions: equal stores after interruptions, and rejection of invalid data."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import ase
import ase.io
import h5py
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.filters import Filters
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store import conversion, conversion_plan, shard_conversion
from mlip_jax.datasets.store.conversion import ConversionSpec
from mlip_jax.datasets.store.store import Store, is_store

REPOSITORY = Path(__file__).parents[3]
DATA = REPOSITORY / "tests" / "data"
MOLECULES = DATA / "gfn2_small.hdf5"  # 17 molecules of 6 conformations
# Arguments: source, store, number of processes and, optionally, moments. For each moment, a
# conversion into store/MOMENT is killed just before it moves file number MOMENT into place.
SCRIPT = """
import os, signal, sys
from mlip_jax.datasets.store import conversion

def killed_at(spec, folder, moment):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count, replace = [0], os.replace

    def counted(*paths):
        if count[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        replace(*paths)

    os.replace = counted
    conversion.convert(spec, f"{folder}/{moment}", num_processes=1, progress=False)
    os._exit(0)

if __name__ == "__main__":
    source, folder, processes = sys.argv[1:4]
    if len(sys.argv) == 4:
        spec = conversion.ConversionSpec(source, atoms_per_shard=20)
        conversion.convert(spec, folder, num_processes=int(processes), progress=False)
    for moment in map(int, sys.argv[4:]):
        spec = conversion.ConversionSpec(source, atoms_per_shard=500)
        print(moment, killed_at(spec, folder, moment), flush=True)
"""


def convert(spec, folder, **options):
    return conversion.convert(spec, folder, **{"num_processes": 1, "progress": False} | options)


def spec_of(path=MOLECULES, atoms_per_shard=60, **fields):
    return ConversionSpec(str(path), atoms_per_shard=atoms_per_shard, **fields)


def contents(folder):
    """Return the bytes of every file of a store except the lock, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.name != ".conversion.lock"
    }


def shard_files(folder):
    return sorted(Path(folder).glob("shards/*.safetensors"))


def removed(folder):
    with open(folder / "removed.csv", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def edited(path, change, source=MOLECULES):
    """Write a copy of the data set after applying `change(number, group)` to every group."""
    shutil.copy(source, path)
    with h5py.File(path, "a") as file:
        for number, name in enumerate(file):
            change(number, file[name])
    return path


def gradients_negated(number, group):
    group["dft_total_gradient"][...] = -group["dft_total_gradient"][...]


def repeated(path, times):
    """Write the molecules of the data set several times with other conformations."""
    rng = np.random.default_rng(0)
    with h5py.File(MOLECULES) as source, h5py.File(path, "w") as file:
        for again in range(times):
            for name in source:
                source.copy(name, file, f"{name} {again:03d}")
                file[f"{name} {again:03d}/conformations"][...] += rng.normal(scale=1e-3)
    return path


@pytest.fixture(scope="module")
def reference_store(tmp_path_factory):
    """A store of MOLECULES in many shards, converted without interruption."""
    return convert(spec_of(), tmp_path_factory.mktemp("reference") / "store")


@pytest.fixture
def copy(reference_store, tmp_path):
    return Path(shutil.copytree(reference_store, tmp_path / "store"))


def script(tmp_path, *arguments):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(file), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
    )


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 0)])
@pytest.mark.parametrize("atoms_per_shard", [60, 10**6])
def test_equals_reading_the_source(tmp_path, dtype, tolerance, atoms_per_shard):
    with spec_of().open() as source:
        expected = Columns.from_structures(source)
    folder = convert(spec_of(dtype=dtype, atoms_per_shard=atoms_per_shard), tmp_path / "store")
    store = Store(folder)
    assert len(shard_files(folder)) == (17 if atoms_per_shard == 60 else 1)
    assert len(store) == len(expected) == 102 and store.manifest["dtype"] == dtype
    actual = store.take(np.arange(len(store)))
    for name, value in vars(expected).items():
        if name in ("positions", "forces"):
            np.testing.assert_allclose(
                getattr(actual, name), value, rtol=0, atol=tolerance * np.abs(value).max()
            )
        else:
            np.testing.assert_equal(getattr(actual, name), value, err_msg=name)


def test_shards_have_about_the_requested_size(tmp_path):
    folder = convert(spec_of(atoms_per_shard=200), tmp_path / "store")
    sizes = [s["atoms"] for s in Store(folder).manifest["shards"]]
    assert (
        all(100 <= size <= 220 for size in sizes[:-1])
        and sum(sizes) == Store(folder).index("n_atoms").sum()
    )


def test_manifest_describes_the_store(reference_store):
    manifest = Store(reference_store).manifest
    assert (
        manifest["structures"] == 102 and manifest["molecules"] == 17 and not manifest["periodic"]
    )
    source = manifest["source"]
    assert (
        source["reader"] == "spice"
        and source["records"] == 17
        and source["units"]["positions"] == "bohr"
    )
    assert source["files"][0]["name"] == MOLECULES.name and len(source["files"][0]["sha256"]) == 64
    assert (
        manifest["level_of_theory"].startswith("GFN2-xTB") and manifest["units"]["forces"] == "eV/Å"
    )
    assert (
        manifest["counts"] == {"read": 102, "skipped": {}, "removed": {}}
        and manifest["problems"] == []
    )
    assert manifest["findings"]["counts"]["structures"] == 102
    assert manifest["properties"] == {"formation_energy": []} and manifest["atom_properties"] == {}
    assert removed(reference_store) == []


def test_properties_are_in_the_manifest(tmp_path):
    path = DATA / "readers" / "ani" / "ani1x_small.hdf5"
    store = Store(convert(spec_of(path, 10), tmp_path / "store"))
    assert store.manifest["properties"] == {"dipole": [3]}
    assert store.manifest["atom_properties"] == {"cm5_charges": [], "hirshfeld_charges": []}
    assert len(store.manifest["shards"]) > 1
    columns = store.take(np.arange(len(store)))
    assert columns.properties["dipole"].shape == (len(store), 3)
    assert columns.atom_properties["cm5_charges"].shape == columns.numbers.shape


def test_official_split_is_stored(tmp_path):
    path = DATA / "readers" / "md17" / "rmd17_ethanol.npz"
    store = Store(convert(spec_of(path, 27), tmp_path / "store"))
    rows = {
        part: np.loadtxt(path.parent / "splits" / f"ethanol_{part}_01.csv", dtype=int).tolist()
        for part in ("train", "test")
    }
    assert {name: v.tolist() for name, v in store.official_split().items()} == rows
    assert (
        store.manifest["official_split"] == ["test", "train"]
        and len(store.manifest["source"]["files"]) == 3
    )


def test_bytes_do_not_depend_on_the_number_of_processes(reference_store, tmp_path):
    folder = convert(spec_of(), tmp_path / "two", num_processes=2)
    assert contents(folder) == contents(reference_store)


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path):
    """Workers compute with one thread, this process with many, on a sufficiently large shard."""
    source = repeated(tmp_path / "many.hdf5", 40)
    stores = [
        convert(spec_of(source, 12_000), tmp_path / f"{n}", num_processes=n, reject_invalid=False)
        for n in (1, 2)
    ]
    assert len(shard_files(stores[0])) >= 3 and contents(stores[0]) == contents(stores[1])


def test_resumes_after_being_killed_at_any_point(tmp_path):
    """Killed before each file that a conversion moves into place; temporary files remain."""
    moments = range(20)
    expected = contents(convert(spec_of(atoms_per_shard=500), tmp_path / "reference"))
    (tmp_path / "killed").mkdir()
    process = script(tmp_path, MOLECULES, tmp_path / "killed", 1, *moments)
    output, errors = process.communicate(timeout=600)
    status = [int(line.split()[1]) for line in output.splitlines()]
    assert len(status) == len(moments), errors
    kills = status.index(0)
    assert status[:kills] == [signal.SIGKILL] * kills and kills == len(
        expected
    )  # each file is one moment
    for moment in moments[:kills]:
        folder = tmp_path / "killed" / str(moment)
        assert not is_store(folder)
        before = {
            p: p.stat().st_mtime_ns for p in shard_files(folder) if p.with_suffix(".json").exists()
        }
        convert(spec_of(atoms_per_shard=500), folder)
        assert contents(folder) == expected, f"killed before file {moment}"
        assert all(p.stat().st_mtime_ns == modified for p, modified in before.items()), (
            "finished shards must not be converted again"
        )


def processes():
    """Return the parent of every running process."""
    actual = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            actual[int(stat.parent.name)] = int(parent)
    return actual


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="requires /proc, which lists processes"
)
def test_resumes_after_being_killed_with_two_processes(tmp_path):
    """No process continues in the background, and the next start converts the rest."""
    source = repeated(tmp_path / "many.hdf5", 6)
    process = script(tmp_path, source, tmp_path / "store", 2)
    deadline = time.monotonic() + 60
    while len(shard_files(tmp_path / "store")) < 6:
        assert process.poll() is None and time.monotonic() < deadline, (
            "the conversion does not get on"
        )
        time.sleep(0.002)
    children = [pid for pid, parent in processes().items() if parent == process.pid]
    process.kill()
    process.wait()
    assert len(children) >= 2 and not is_store(tmp_path / "store")
    deadline = time.monotonic() + 60
    try:
        while set(children) & processes().keys():
            assert time.monotonic() < deadline, "workers are left behind"
            time.sleep(0.01)
    finally:
        for pid in set(children) & processes().keys():
            os.kill(pid, signal.SIGKILL)
    done = {
        p: p.stat().st_mtime_ns
        for p in shard_files(tmp_path / "store")
        if p.with_suffix(".json").exists()
    }
    assert 5 <= len(done) < 102
    convert(spec_of(source, 20), tmp_path / "store")
    assert all(p.stat().st_mtime_ns == modified for p, modified in done.items())
    assert contents(tmp_path / "store") == contents(
        convert(spec_of(source, 20), tmp_path / "reference")
    )


def test_two_conversions_to_the_same_folder(tmp_path):
    source = repeated(tmp_path / "many.hdf5", 4)
    scripts = [script(tmp_path, source, tmp_path / "store", 1) for _ in range(2)]
    for process in scripts:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert contents(tmp_path / "store") == contents(
        convert(spec_of(source, 20), tmp_path / "reference")
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x07"),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:50]),
    ],
    ids=["deleted", "flipped", "empty", "cut"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_only_the_corrupted_shard_is_rebuilt(reference_store, copy, spoil, finished):
    before = {p.name: p.stat().st_mtime_ns for p in shard_files(copy)}
    spoil(copy / "shards" / "00005.safetensors")
    if not finished:
        (copy / "manifest.json").unlink()
    convert(spec_of(), copy)
    changed = [p.name for p in shard_files(copy) if p.stat().st_mtime_ns != before[p.name]]
    assert changed == ["00005.safetensors"]
    assert contents(copy) == contents(reference_store)


def test_corrupted_store_is_unfinished_until_rebuilt(copy, monkeypatch):
    (copy / "shards" / "00005.safetensors").unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shard_conversion, "write_shard", full)
        with pytest.raises(DatasetError, match="No space left"):
            convert(spec_of(), copy)
    assert not is_store(copy)
    convert(spec_of(), copy)
    Store(copy).verify()


@pytest.mark.parametrize("content", ["", "[]", '{"shards": [{}]}', '{"sha256": 1}'])
def test_corrupted_metadata_of_a_shard_are_rebuilt(reference_store, copy, content):
    (copy / "shards" / "00002.json").write_text(content)
    (copy / "manifest.json").write_text(content)
    convert(spec_of(), copy)
    assert contents(copy) == contents(reference_store)


@pytest.mark.parametrize("content", ["", "[7]", "\udcff"])
def test_corrupted_plan_is_rejected(copy, content):
    (copy / "conversion.json").write_text(content, errors="surrogateescape")
    with pytest.raises(DatasetError, match="conversion.json: is corrupted.*another folder"):
        convert(spec_of(), copy)


def test_second_conversion_changes_nothing(copy, monkeypatch):
    before = {
        p: p.stat().st_mtime_ns
        for p in copy.rglob("*")
        if p.is_file() and p.name != ".conversion.lock"
    }
    for module, name in (
        (shard_conversion, "write_shard"),
        (shard_conversion, "write_json"),
        (conversion_plan, "write_json"),
    ):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("something is written"))
    assert convert(spec_of(), copy) == copy
    assert {
        p: p.stat().st_mtime_ns
        for p in copy.rglob("*")
        if p.is_file() and p.name != ".conversion.lock"
    } == before


def change_inside(path):
    """Change bytes near the end but not the size and time of a file."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("finished", [True, False])
def test_changed_source_is_rejected(tmp_path, finished):
    source = Path(shutil.copy(MOLECULES, tmp_path / "data.hdf5"))
    folder = convert(spec_of(source), tmp_path / "store")
    change_inside(source)
    if not finished:
        (folder / "manifest.json").unlink()
    with pytest.raises(
        DatasetError,
        match="(?s)another source or with other settings.*source.digest: .* -> .*another folder",
    ):
        convert(spec_of(source), folder)
    assert is_store(folder) == finished


def test_source_with_another_modification_time_is_accepted(tmp_path):
    """A finished store with equal bytes is valid. An unfinished conversion is not resumed."""
    source = Path(shutil.copy(MOLECULES, tmp_path / "data.hdf5"))
    folder = convert(spec_of(source), tmp_path / "store")
    os.utime(source, ns=(1, 1))
    assert convert(spec_of(source), folder) == folder
    (folder / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="source.modified: .* -> "):
        convert(spec_of(source), folder)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"filters": {"max_atoms": 8}}, "recipe.filters.max_atoms: '\\(absent\\)' -> 8"),
        ({"dtype": "float64"}, "recipe.dtype: 'float32' -> 'float64'"),
        ({"atoms_per_shard": 61}, "recipe.atoms_per_shard: 60 -> 61"),
    ],
)
def test_other_settings_are_rejected(copy, fields, words):
    with pytest.raises(DatasetError, match=words):
        convert(spec_of(**fields), copy)
    assert is_store(copy)


def test_shards_without_a_plan_are_rejected(copy):
    (copy / "conversion.json").unlink()
    with pytest.raises(DatasetError, match="contains shards but no conversion.json"):
        convert(spec_of(), copy)


@pytest.mark.parametrize("atoms_per_shard", [60, 400, 10**6])
def test_gradients_instead_of_forces_are_rejected(tmp_path, atoms_per_shard):
    source = edited(tmp_path / "wrong.hdf5", gradients_negated)
    spec = spec_of(source, atoms_per_shard)
    with pytest.raises(
        DatasetError,
        match=r"(?s)wrong.hdf5: rejected.*look like gradients.*--config.data.reject_invalid=False",
    ):
        convert(spec, tmp_path / "store")
    assert not is_store(tmp_path / "store")
    with pytest.raises(DatasetError, match="look like gradients"):
        convert(spec, tmp_path / "store")
    store = Store(convert(spec, tmp_path / "store", reject_invalid=False))
    assert [p["what"] for p in store.manifest["problems"] if p["severity"] == "error"] == [
        "gradients"
    ]
    right = Store(convert(spec_of(MOLECULES, atoms_per_shard), tmp_path / "right"))
    assert not right.manifest["problems"]


def test_rejected_source_is_not_converted_completely(tmp_path):
    """The pairs of the first shard suffice."""
    source = edited(tmp_path / "wrong.hdf5", gradients_negated)
    with pytest.raises(DatasetError, match="look like gradients"):
        convert(spec_of(source, 400), tmp_path / "store")
    assert len(shard_files(tmp_path / "store")) == 1


def test_problems_beyond_the_first_shard_are_rejected_at_the_end(tmp_path):
    def all_but_first(number, group):
        if number > 0:
            gradients_negated(number, group)

    source = edited(tmp_path / "wrong.hdf5", all_but_first)
    with pytest.raises(DatasetError, match="look like gradients|wrong sign"):
        convert(spec_of(source), tmp_path / "store")
    assert len(shard_files(tmp_path / "store")) == 17 and not is_store(tmp_path / "store")


def test_problems_are_recorded_and_logged_by_the_user_of_the_store(tmp_path, caplog):
    """Detects a warning that the conversion and the task both print."""
    source = edited(tmp_path / "wrong.hdf5", gradients_negated)
    convert(spec_of(source), tmp_path / "store", reject_invalid=False)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert any("look like gradients" in p["message"] for p in manifest["problems"])
    assert "look like gradients" not in caplog.text


def test_diagnosis_does_not_depend_on_interruptions(tmp_path):
    """One bad structure of 102 is accepted, also if the conversion resumes with its shard."""

    def collide(number, group):
        if number == 9:
            group["conformations"][2, 1] = group["conformations"][2, 0] + 0.1

    source = edited(tmp_path / "data.hdf5", collide)
    store = Store(convert(spec_of(source), tmp_path / "store"))
    assert ("warning", "atoms too close") in {
        (p["severity"], p["what"]) for p in store.manifest["problems"]
    }
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    for number in range(9, 17):
        (tmp_path / "store" / "shards" / f"{number:05d}.safetensors").unlink()
    convert(spec_of(source), tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_filters_exclude_structures_with_their_reason(tmp_path):
    settings = {
        "elements": ["H", "C", "N", "O"],
        "charge": 0.0,
        "max_atoms": 9,
        "max_force": 6.0,
        "require": "both",
    }
    folder = convert(spec_of(filters=settings), tmp_path / "store")
    store = Store(folder)
    with spec_of().open() as source:
        everything = list(source)

    def passes(s):
        return (
            {*s.numbers.tolist()} <= {1, 6, 7, 8}
            and s.charge == 0
            and len(s) <= 9
            and np.abs(s.forces).max() <= 6
        )

    kept = [s for s in everything if passes(s)]
    assert 10 < len(kept) < 90 and not passes(everything[0]), "the first shard is empty"
    assert store.manifest["shards"][0]["structures"] == 0 and len(shard_files(folder)) == 17
    assert [(s.record, s.conformer) for s in store] == [(s.record, s.conformer) for s in kept]
    assert [identity for identity, _ in removed(folder)] == [
        f"{s.source}#{s.conformer}" for s in everything if not passes(s)
    ]
    counts = store.manifest["counts"]
    reasons = [reason for _, reason in removed(folder)]
    assert counts["removed"] == {r: reasons.count(r) for r in reasons}
    assert {"elements", "charge", "force too large"} <= set(reasons)
    assert counts["read"] == 102 == len(store) + sum(counts["removed"].values())
    assert store.manifest["filters"] == settings


def test_filters_over_conformations(tmp_path):
    def outlier(number, group):
        if number % 3 == 0:
            group["dft_total_energy"][4] += 5.0
        elif number % 3 == 1:
            group["dft_total_gradient"][2] = 50 * group["dft_total_gradient"][2]

    source = edited(tmp_path / "data.hdf5", outlier)
    settings = {"max_energy_z": 20.0, "max_force_z": 20.0}
    folder = convert(spec_of(source, filters=settings), tmp_path / "store", reject_invalid=False)
    store = Store(folder)
    with h5py.File(source) as file:
        expected = {
            (f"data.hdf5:{name}#{(4, 2)[n % 3]}", ("energy outlier", "force outlier")[n % 3])
            for n, name in enumerate(file)
            if n % 3 < 2
        }
    assert set(removed(folder)) == expected and len(removed(folder)) == len(expected) == 12
    assert len(store) == 90 and store.manifest["filtered"]
    assert store.manifest["counts"]["removed"] == {"energy outlier": 6, "force outlier": 6}
    one = Store(
        convert(
            spec_of(source, 10**6, filters=settings), tmp_path / "one shard", reject_invalid=False
        )
    )
    assert removed(one.path) == removed(folder)
    np.testing.assert_array_equal(one.index("fingerprint"), store.index("fingerprint"))


@pytest.mark.parametrize("reject_invalid", [True, False])
def test_filters_that_exclude_everything_are_rejected(tmp_path, reject_invalid):
    with pytest.raises(
        DatasetError, match="all 102 structures are excluded .*'too many atoms': 102.*the filters"
    ):
        convert(
            spec_of(filters={"max_atoms": 2}), tmp_path / "store", reject_invalid=reject_invalid
        )
    assert not is_store(tmp_path / "store")


def test_skipped_conformations_are_counted_and_listed(tmp_path):
    def lost(number, group):
        if number in (2, 5):
            group["conformations"][3, 0] = np.nan

    source = edited(tmp_path / "data.hdf5", lost)
    store = Store(convert(spec_of(source, filters={"charge": 0.0}), tmp_path / "store"))
    with h5py.File(source) as file:
        names = list(file)
    named = {(f"data.hdf5:{names[n]}#3", "positions not finite") for n in (2, 5)}
    assert named <= set(removed(store.path))
    counts = store.manifest["counts"]
    assert counts == {
        "read": 100,
        "skipped": {"positions not finite": 2},
        "removed": {"charge": 102 - 2 - len(store) - (counts["read"] - 100)},
    }
    assert len(removed(store.path)) == 102 - len(store) and 0 < counts["removed"]["charge"] < 100


@pytest.mark.parametrize("written", [0, 1, 2, 4, 5, 9, 15])
def test_full_disk_is_reported(tmp_path, monkeypatch, written):
    """The cause is reported, finished shards stay, and a rerun converts the rest."""
    expected = contents(convert(spec_of(atoms_per_shard=500), tmp_path / "reference"))
    fsync, count = os.fsync, [0]

    def full(descriptor):
        count[0] += 1
        if count[0] > written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DatasetError, match="cannot write the store.*No space left.*Finished shards are kept"
        ):
            convert(spec_of(atoms_per_shard=500), tmp_path / "store")
    assert count[0] == written + 1 and not is_store(tmp_path / "store")
    done = {p: p.stat().st_mtime_ns for p in shard_files(tmp_path / "store")}
    assert len(done) == min(written // 2, len(shard_files(tmp_path / "reference")))
    assert not list((tmp_path / "store").glob("shards/*.tmp"))
    convert(spec_of(atoms_per_shard=500), tmp_path / "store")
    assert contents(tmp_path / "store") == expected
    complete = [p for i, p in enumerate(sorted(done)) if 2 * i + 3 <= written]
    assert all(p.stat().st_mtime_ns == done[p] for p in complete)


@contextmanager
def ordinary_user():
    """Drop root privileges temporarily if the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_read_only_folder_is_reported():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = shutil.copy(MOLECULES, folder)
        (folder / "stores").mkdir()
        for path, mode in ((folder, 0o755), (source, 0o644), (folder / "stores", 0o555)):
            os.chmod(path, mode)
        spec = spec_of(source, reader="spice")
        spec.open().close()  # imports now, because the modules may be unreadable for other users
        with (
            ordinary_user(),
            pytest.raises(DatasetError, match="stores/a: cannot write the store.*Permission"),
        ):
            convert(spec, folder / "stores" / "a")


def test_file_instead_of_the_folder_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(DatasetError, match="cannot write the store"):
            convert(spec_of(), folder)


def test_errors_of_the_reader_pass_through_workers(tmp_path):
    """An unreadable record is identified, whichever process reads it."""

    def wrong_unit(number, group):
        if number == 11:  # not among the records that are looked at beforehand
            group["conformations"].attrs["units"] = "angstrom"

    source = edited(tmp_path / "data.hdf5", wrong_unit, repeated(tmp_path / "many.hdf5", 4))
    for n in (1, 2):
        with pytest.raises(
            DatasetError, match="data.hdf5:[-a-z]+ 003: conformations is in 'angstrom'"
        ):
            convert(spec_of(source), tmp_path / f"{n}", num_processes=n)
        assert not is_store(tmp_path / f"{n}") and shard_files(tmp_path / f"{n}")


def test_invalid_settings_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="dtype must be.*'float16'"):
        convert(spec_of(dtype="float16"), tmp_path / "a")
    with pytest.raises(ConfigError, match="Did you mean 'spice'"):
        convert(spec_of(reader="spise"), tmp_path / "b")
    with pytest.raises(ValueError, match="'Xx' is not the symbol"):
        convert(spec_of(filters={"elements": ["Xx"]}), tmp_path / "c")
    with pytest.raises(DatasetError, match="nowhere.hdf5: no such file"):
        convert(spec_of(tmp_path / "nowhere.hdf5"), tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abd")


def test_default_filters_keep_structures_without_labels(tmp_path):
    """A store may contain structures to relax. Training applies its own filters."""
    assert Filters(**spec_of().filters).require == "none"

    def unlabelled(number, group):
        if number == 3:
            del group["dft_total_energy"], group["dft_total_gradient"]

    store = Store(convert(spec_of(edited(tmp_path / "data.hdf5", unlabelled)), tmp_path / "store"))
    without = np.flatnonzero(np.asarray(store.index("record")) == 3)
    assert len(store) == 102 and np.isnan(store.take(without).energy).all()
    assert (
        np.isnan(store.take(without).forces).all()
        and np.isnan(store.index("max_force")[without]).all()
    )
    assert np.isfinite(
        store.take(np.flatnonzero(np.asarray(store.index("record")) != 3)).forces
    ).all()
    assert (
        json.loads((store.path / "manifest.json").read_text())["problems"][0]["severity"]
        == "warning"
    )


def test_first_shard_without_labels_is_accepted(tmp_path):
    """Problems that require the whole data are not diagnosed from a part."""
    frames = []
    for s in range(60):
        atoms = ase.Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
        atoms.positions[1, 0] += 0.001 * s
        energy = -10.0 if s >= 30 else np.nan
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        frames.append(atoms)
    ase.io.write(tmp_path / "half.xyz", frames, format="extxyz")
    store = Store(
        convert(
            ConversionSpec(
                str(tmp_path / "half.xyz"), "ase", {"energy_key": "energy"}, atoms_per_shard=30
            ),
            tmp_path / "store",
            num_processes=1,
            progress=False,
        )
    )
    assert len(store) == 60 and np.isfinite(store.index("energy")).sum() == 30
    assert any("energy" in p["message"] for p in store.manifest["problems"])


def test_unread_labels_and_remarks_are_in_the_manifest(tmp_path):
    """The notes of a store list the labels that its source contains and the reader does not read."""
    frame = "2\nenergy=-31.7 my_stress=1.5\nH 0 0 0\nH 0 0 0.74\n"
    (tmp_path / "a.xyz").write_text(frame + frame.replace("my_stress", "my_dipole"))
    folder = convert(spec_of(tmp_path / "a.xyz"), tmp_path / "store")
    (note,) = Store(folder).manifest["notes"]
    assert "my_dipole (1), my_stress (1)" in note and "property_keys=NAME" in note


def test_wrong_signs_name_the_option_that_corrects_them(tmp_path):
    """Gradients under the name forces, in a file of the layout of ANI-1."""
    rng, count = np.random.default_rng(0), 40
    lengths = 0.74 + 0.05 * rng.normal(size=count)
    positions = np.zeros((count, 2, 3))
    positions[:, 1, 0] = lengths
    stretch, stiffness = lengths - 0.74, 36.0 / 27.2114  # hartree/Å²
    gradient = np.zeros((count, 2, 3))
    gradient[:, 1, 0], gradient[:, 0, 0] = stiffness * stretch, -stiffness * stretch
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["m/species"] = np.array([b"H", b"H"])
        file["m/coordinates"], file["m/forces"] = positions, gradient
        file["m/energies"] = 0.5 * stiffness * stretch**2 - 1.17
    with pytest.raises(DatasetError, match="gradients.*forces_are_gradients=True"):
        convert(spec_of(tmp_path / "a.h5"), tmp_path / "store")
    convert(
        spec_of(tmp_path / "a.h5", options={"forces_are_gradients": True}), tmp_path / "corrected"
    )
