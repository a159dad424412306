"""Conversions: the same store however often they are killed, by however many processes, and no store of bad data."""

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
from mlip_jax.datasets.store import conversion
from mlip_jax.datasets.store.conversion import ConversionSpec
from mlip_jax.datasets.store.store import Store, is_store

REPOSITORY = Path(__file__).parents[3]
DATA = REPOSITORY / "tests" / "data"
MOLECULES = DATA / "gfn2_small.hdf5"  # 17 molecules of 6 conformations
# Arguments: source, store, processes; where given, moments: a conversion of its own, into store/MOMENT, is killed
# just before it would put its file number MOMENT in place.
SCRIPT = """
import os, signal, sys
from mlip_jax.datasets.store import conversion

def killed_at(recipe, folder, moment):
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
    conversion.convert(recipe, f"{folder}/{moment}", num_processes=1, progress=False)
    os._exit(0)

if __name__ == "__main__":
    source, folder, processes = sys.argv[1:4]
    if len(sys.argv) == 4:
        recipe = conversion.ConversionSpec(source, atoms_per_shard=20)
        conversion.convert(recipe, folder, num_processes=int(processes), progress=False)
    for moment in map(int, sys.argv[4:]):
        print(moment, killed_at(conversion.ConversionSpec(source, atoms_per_shard=500), folder, moment), flush=True)
"""


def convert(recipe, folder, **options):
    return conversion.convert(recipe, folder, **{"num_processes": 1, "progress": False} | options)


def recipe(path=MOLECULES, atoms_per_shard=60, **fields):
    return ConversionSpec(str(path), atoms_per_shard=atoms_per_shard, **fields)


def contents(folder):
    """Bytes of every file of a store but the lock, by name."""
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
    """A copy of the data set where `change(number, group)` was applied to every group."""
    shutil.copy(source, path)
    with h5py.File(path, "a") as file:
        for number, name in enumerate(file):
            change(number, file[name])
    return path


def gradients_negated(number, group):
    group["dft_total_gradient"][...] = -group["dft_total_gradient"][...]


def repeated(path, times):
    """The molecules of the data set again and again, with other conformations."""
    rng = np.random.default_rng(0)
    with h5py.File(MOLECULES) as source, h5py.File(path, "w") as file:
        for again in range(times):
            for name in source:
                source.copy(name, file, f"{name} {again:03d}")
                file[f"{name} {again:03d}/conformations"][...] += rng.normal(scale=1e-3)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A store of MOLECULES in many shards."""
    return convert(recipe(), tmp_path_factory.mktemp("undisturbed") / "store")


@pytest.fixture
def copy(undisturbed, tmp_path):
    return Path(shutil.copytree(undisturbed, tmp_path / "store"))


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
    with recipe().open() as source:
        expected = Columns.from_structures(source)
    folder = convert(recipe(dtype=dtype, atoms_per_shard=atoms_per_shard), tmp_path / "store")
    store = Store(folder)
    assert len(shard_files(folder)) == (17 if atoms_per_shard == 60 else 1)
    assert len(store) == len(expected) == 102 and store.manifest["dtype"] == dtype
    found = store.take(np.arange(len(store)))
    for name, value in vars(expected).items():
        if name in ("positions", "forces"):
            np.testing.assert_allclose(
                getattr(found, name), value, rtol=0, atol=tolerance * np.abs(value).max()
            )
        else:
            np.testing.assert_equal(getattr(found, name), value, err_msg=name)


def test_shards_hold_about_what_is_asked(tmp_path):
    folder = convert(recipe(atoms_per_shard=200), tmp_path / "store")
    sizes = [s["atoms"] for s in Store(folder).manifest["shards"]]
    assert (
        all(100 <= size <= 220 for size in sizes[:-1])
        and sum(sizes) == Store(folder).index("n_atoms").sum()
    )


def test_manifest_says_what_the_store_is(undisturbed):
    manifest = Store(undisturbed).manifest
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
    assert removed(undisturbed) == []


def test_properties_stand_in_the_manifest(tmp_path):
    path = DATA / "readers" / "ani" / "ani1x_small.hdf5"
    store = Store(convert(recipe(path, 10), tmp_path / "store"))
    assert store.manifest["properties"] == {"dipole": [3]}
    assert store.manifest["atom_properties"] == {"cm5_charges": [], "hirshfeld_charges": []}
    assert len(store.manifest["shards"]) > 1
    columns = store.take(np.arange(len(store)))
    assert columns.properties["dipole"].shape == (len(store), 3)
    assert columns.atom_properties["cm5_charges"].shape == columns.numbers.shape


def test_official_split_is_stored(tmp_path):
    path = DATA / "readers" / "md17" / "rmd17_ethanol.npz"
    store = Store(convert(recipe(path, 27), tmp_path / "store"))
    rows = {
        part: np.loadtxt(path.parent / "splits" / f"ethanol_{part}_01.csv", dtype=int).tolist()
        for part in ("train", "test")
    }
    assert {name: v.tolist() for name, v in store.official_split().items()} == rows
    assert (
        store.manifest["official_split"] == ["test", "train"]
        and len(store.manifest["source"]["files"]) == 3
    )


def test_number_of_processes_changes_no_byte(undisturbed, tmp_path):
    folder = convert(recipe(), tmp_path / "two", num_processes=2)
    assert contents(folder) == contents(undisturbed)


def test_number_of_threads_changes_no_byte(tmp_path):
    """Workers compute with one thread, this process with many; a shard large enough for that comes from both."""
    source = repeated(tmp_path / "many.hdf5", 40)
    both = [
        convert(recipe(source, 12_000), tmp_path / f"{n}", num_processes=n, refuse=False)
        for n in (1, 2)
    ]
    assert len(shard_files(both[0])) >= 3 and contents(both[0]) == contents(both[1])


def test_killed_at_any_moment(tmp_path):
    """Before each of the files that a conversion puts in place; what was being written then stays beside."""
    moments = range(20)
    expected = contents(convert(recipe(atoms_per_shard=500), tmp_path / "undisturbed"))
    (tmp_path / "killed").mkdir()
    process = script(tmp_path, MOLECULES, tmp_path / "killed", 1, *moments)
    output, errors = process.communicate(timeout=120)
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
        convert(recipe(atoms_per_shard=500), folder)
        assert contents(folder) == expected, f"killed before file {moment}"
        assert all(p.stat().st_mtime_ns == made for p, made in before.items()), (
            "what is done is not done again"
        )


def processes():
    """Parent by process, of all that run."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            found[int(stat.parent.name)] = int(parent)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells which processes run")
def test_killed_with_two_processes(tmp_path):
    """Nobody goes on in the background, and the next start does what is left."""
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
    deadline = time.monotonic() + 10
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
    convert(recipe(source, 20), tmp_path / "store")
    assert all(p.stat().st_mtime_ns == made for p, made in done.items())
    assert contents(tmp_path / "store") == contents(
        convert(recipe(source, 20), tmp_path / "undisturbed")
    )


def test_two_at_the_same_folder(tmp_path):
    source = repeated(tmp_path / "many.hdf5", 4)
    both = [script(tmp_path, source, tmp_path / "store", 1) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert contents(tmp_path / "store") == contents(
        convert(recipe(source, 20), tmp_path / "undisturbed")
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
def test_only_the_damaged_shard_is_made_anew(undisturbed, copy, spoil, finished):
    before = {p.name: p.stat().st_mtime_ns for p in shard_files(copy)}
    spoil(copy / "shards" / "00005.safetensors")
    if not finished:
        (copy / "manifest.json").unlink()
    convert(recipe(), copy)
    changed = [p.name for p in shard_files(copy) if p.stat().st_mtime_ns != before[p.name]]
    assert changed == ["00005.safetensors"]
    assert contents(copy) == contents(undisturbed)


def test_damaged_store_is_none_until_it_is_mended(copy, monkeypatch):
    (copy / "shards" / "00005.safetensors").unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_shard", full)
        with pytest.raises(DatasetError, match="No space left"):
            convert(recipe(), copy)
    assert not is_store(copy)
    convert(recipe(), copy)
    Store(copy).verify()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 1}'])
def test_damaged_notes_of_a_shard_are_made_anew(undisturbed, copy, content):
    (copy / "shards" / "00002.json").write_text(content)
    (copy / "manifest.json").write_text(content)
    convert(recipe(), copy)
    assert contents(copy) == contents(undisturbed)


@pytest.mark.parametrize("content", ["", "[7]", "\udcff"])
def test_damaged_plan(copy, content):
    (copy / "conversion.json").write_text(content, errors="surrogateescape")
    with pytest.raises(DatasetError, match="conversion.json: is damaged.*another folder"):
        convert(recipe(), copy)


def test_second_call_changes_nothing(copy, monkeypatch):
    before = {
        p: p.stat().st_mtime_ns
        for p in copy.rglob("*")
        if p.is_file() and p.name != ".conversion.lock"
    }
    monkeypatch.setattr(conversion, "write_shard", lambda *_: pytest.fail("a shard is made again"))
    monkeypatch.setattr(conversion, "write_json", lambda *_: pytest.fail("something is written"))
    assert convert(recipe(), copy) == copy
    assert {
        p: p.stat().st_mtime_ns
        for p in copy.rglob("*")
        if p.is_file() and p.name != ".conversion.lock"
    } == before


def change_inside(path):
    """Other bytes near the end, the same size and time."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("finished", [True, False])
def test_source_that_changed_is_refused(tmp_path, finished):
    source = Path(shutil.copy(MOLECULES, tmp_path / "data.hdf5"))
    folder = convert(recipe(source), tmp_path / "store")
    change_inside(source)
    if not finished:
        (folder / "manifest.json").unlink()
    with pytest.raises(
        DatasetError,
        match="(?s)another source or with other settings.*source.digest: .* -> .*another folder",
    ):
        convert(recipe(source), folder)
    assert is_store(folder) == finished


def test_source_with_another_time_of_change(tmp_path):
    """The same bytes: the store is good. An unfinished conversion cannot know, and does not go on."""
    source = Path(shutil.copy(MOLECULES, tmp_path / "data.hdf5"))
    folder = convert(recipe(source), tmp_path / "store")
    os.utime(source, ns=(1, 1))
    assert convert(recipe(source), folder) == folder
    (folder / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="source.modified: .* -> "):
        convert(recipe(source), folder)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"filters": {"max_atoms": 8}}, "recipe.filters.max_atoms: '\\(absent\\)' -> 8"),
        ({"dtype": "float64"}, "recipe.dtype: 'float32' -> 'float64'"),
        ({"atoms_per_shard": 61}, "recipe.atoms_per_shard: 60 -> 61"),
    ],
)
def test_other_settings_are_refused(copy, fields, words):
    with pytest.raises(DatasetError, match=words):
        convert(recipe(**fields), copy)
    assert is_store(copy)


def test_shards_without_a_plan_are_refused(copy):
    (copy / "conversion.json").unlink()
    with pytest.raises(DatasetError, match="holds shards but no conversion.json"):
        convert(recipe(), copy)


@pytest.mark.parametrize("atoms_per_shard", [60, 400, 10**6])
def test_gradients_for_forces_are_refused(tmp_path, atoms_per_shard):
    source = edited(tmp_path / "wrong.hdf5", gradients_negated)
    asked = recipe(source, atoms_per_shard)
    with pytest.raises(
        DatasetError,
        match=r"(?s)wrong.hdf5: refused.*look like gradients.*--config.data.refuse=False",
    ):
        convert(asked, tmp_path / "store")
    assert not is_store(tmp_path / "store")
    with pytest.raises(DatasetError, match="look like gradients"):
        convert(asked, tmp_path / "store")
    store = Store(convert(asked, tmp_path / "store", refuse=False))
    assert [p["what"] for p in store.manifest["problems"] if p["severity"] == "error"] == [
        "gradients"
    ]
    right = Store(convert(recipe(MOLECULES, atoms_per_shard), tmp_path / "right"))
    assert not right.manifest["problems"]


def test_refused_source_is_not_converted_to_its_end(tmp_path):
    """The pairs of the first of its shards tell enough."""
    source = edited(tmp_path / "wrong.hdf5", gradients_negated)
    with pytest.raises(DatasetError, match="look like gradients"):
        convert(recipe(source, 400), tmp_path / "store")
    assert len(shard_files(tmp_path / "store")) == 1


def test_what_the_first_shard_does_not_show_is_refused_in_the_end(tmp_path):
    def all_but_first(number, group):
        if number > 0:
            gradients_negated(number, group)

    source = edited(tmp_path / "wrong.hdf5", all_but_first)
    with pytest.raises(DatasetError, match="look like gradients|wrong sign"):
        convert(recipe(source), tmp_path / "store")
    assert len(shard_files(tmp_path / "store")) == 17 and not is_store(tmp_path / "store")


def test_problems_are_told(tmp_path, caplog):
    source = edited(tmp_path / "wrong.hdf5", gradients_negated)
    convert(recipe(source), tmp_path / "store", refuse=False)
    assert "look like gradients" in caplog.text


def test_being_killed_decides_nothing(tmp_path):
    """One bad structure of 102 is let pass; so it is by a conversion that goes on with the shard that holds it."""

    def collide(number, group):
        if number == 9:
            group["conformations"][2, 1] = group["conformations"][2, 0] + 0.1

    source = edited(tmp_path / "data.hdf5", collide)
    store = Store(convert(recipe(source), tmp_path / "store"))
    assert ("warning", "atoms too close") in {
        (p["severity"], p["what"]) for p in store.manifest["problems"]
    }
    before = contents(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    for number in range(9, 17):
        (tmp_path / "store" / "shards" / f"{number:05d}.safetensors").unlink()
    convert(recipe(source), tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_filters_leave_out_what_they_say(tmp_path):
    settings = {
        "elements": ["H", "C", "N", "O"],
        "charge": 0.0,
        "max_atoms": 9,
        "max_force": 6.0,
        "require": "both",
    }
    folder = convert(recipe(filters=settings), tmp_path / "store")
    store = Store(folder)
    with recipe().open() as source:
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
    folder = convert(recipe(source, filters=settings), tmp_path / "store", refuse=False)
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
        convert(recipe(source, 10**6, filters=settings), tmp_path / "one shard", refuse=False)
    )
    assert removed(one.path) == removed(folder)
    np.testing.assert_array_equal(one.index("fingerprint"), store.index("fingerprint"))


@pytest.mark.parametrize("refuse", [True, False])
def test_nothing_is_left(tmp_path, refuse):
    with pytest.raises(
        DatasetError, match="no structure is left of 102 read .*'too many atoms': 102.*the filters"
    ):
        convert(recipe(filters={"max_atoms": 2}), tmp_path / "store", refuse=refuse)
    assert not is_store(tmp_path / "store")


def test_skipped_conformations_are_counted_and_named(tmp_path):
    def lost(number, group):
        if number in (2, 5):
            group["conformations"][3, 0] = np.nan

    source = edited(tmp_path / "data.hdf5", lost)
    store = Store(convert(recipe(source, filters={"charge": 0.0}), tmp_path / "store"))
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
def test_full_disk(tmp_path, monkeypatch, written):
    """However much had room: the cause is told, what is done stays, and the next start does the rest."""
    expected = contents(convert(recipe(atoms_per_shard=500), tmp_path / "undisturbed"))
    fsync, count = os.fsync, [0]

    def full(descriptor):
        count[0] += 1
        if count[0] > written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DatasetError, match="store cannot be written.*No space left.*What is done stays"
        ):
            convert(recipe(atoms_per_shard=500), tmp_path / "store")
    assert count[0] == written + 1 and not is_store(tmp_path / "store")
    done = {p: p.stat().st_mtime_ns for p in shard_files(tmp_path / "store")}
    assert len(done) == min(written // 2, len(shard_files(tmp_path / "undisturbed")))
    assert not list((tmp_path / "store").glob("shards/*.tmp"))
    convert(recipe(atoms_per_shard=500), tmp_path / "store")
    assert contents(tmp_path / "store") == expected
    complete = [p for i, p in enumerate(sorted(done)) if 2 * i + 3 <= written]
    assert all(p.stat().st_mtime_ns == done[p] for p in complete)


@contextmanager
def ordinary_user():
    """Rights of others for a while, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_read_only_folder():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = shutil.copy(MOLECULES, folder)
        (folder / "stores").mkdir()
        for path, mode in ((folder, 0o755), (source, 0o644), (folder / "stores", 0o555)):
            os.chmod(path, mode)
        asked = recipe(source, reader="spice")
        asked.open().close()  # what is imported then need not be readable by others
        with (
            ordinary_user(),
            pytest.raises(DatasetError, match="stores/a: the store cannot be written.*Permission"),
        ):
            convert(asked, folder / "stores" / "a")


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(DatasetError, match="the store cannot be written"):
            convert(recipe(), folder)


def test_worker_errors_are_the_readers(tmp_path):
    """A record that cannot be read is named, from whichever process it is read."""

    def wrong_unit(number, group):
        if number == 11:  # not among the records that are looked at beforehand
            group["conformations"].attrs["units"] = "angstrom"

    source = edited(tmp_path / "data.hdf5", wrong_unit, repeated(tmp_path / "many.hdf5", 4))
    for n in (1, 2):
        with pytest.raises(
            DatasetError, match="data.hdf5:[-a-z]+ 003: conformations is in 'angstrom'"
        ):
            convert(recipe(source), tmp_path / f"{n}", num_processes=n)
        assert not is_store(tmp_path / f"{n}") and shard_files(tmp_path / f"{n}")


def test_settings_that_mean_nothing(tmp_path):
    with pytest.raises(ValueError, match="dtype must be.*'float16'"):
        convert(recipe(dtype="float16"), tmp_path / "a")
    with pytest.raises(ConfigError, match="Did you mean 'spice'"):
        convert(recipe(reader="spise"), tmp_path / "b")
    with pytest.raises(ValueError, match="'Xx' is not the symbol"):
        convert(recipe(filters={"elements": ["Xx"]}), tmp_path / "c")
    with pytest.raises(DatasetError, match="nowhere.hdf5: no such file"):
        convert(recipe(tmp_path / "nowhere.hdf5"), tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abd")


def test_default_filters_leave_out_nothing_without_labels(tmp_path):
    """A store may hold structures that are there to be relaxed; filters of a training come later."""
    assert Filters(**recipe().filters).require == "none"

    def unlabelled(number, group):
        if number == 3:
            del group["dft_total_energy"], group["dft_total_gradient"]

    store = Store(convert(recipe(edited(tmp_path / "data.hdf5", unlabelled)), tmp_path / "store"))
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


def test_a_first_shard_without_labels_refuses_nothing(tmp_path):
    """What only the whole tells is not judged by a part."""
    frames = []
    for s in range(60):
        atoms = ase.Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
        atoms.positions[1, 0] += 0.001 * s
        energy = -10.0 if s >= 30 else np.nan
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        frames.append(atoms)
    ase.io.write(tmp_path / "half.xyz", frames, format="extxyz")
    made = Store(
        convert(
            ConversionSpec(
                str(tmp_path / "half.xyz"), "ase", {"energy_key": "energy"}, atoms_per_shard=30
            ),
            tmp_path / "store",
            num_processes=1,
            progress=False,
        )
    )
    assert len(made) == 60 and np.isfinite(made.index("energy")).sum() == 30
    assert any("energy" in p["message"] for p in made.manifest["problems"])
