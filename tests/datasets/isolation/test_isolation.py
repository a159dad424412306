"""Tests for the process of native parsers: corrupted input does not crash or stop this process."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase.db
import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.datasets import identity, readers
from mlip_jax.datasets.formats import geom_files
from mlip_jax.datasets.formats.ase_database import AseDatabase
from mlip_jax.datasets.hdf5 import Hdf5File
from mlip_jax.datasets.isolation import files, molecules, process, program
from mlip_jax.datasets.molecules.files import read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles import embedding
from mlip_jax.datasets.store import conversion
from mlip_jax.simulation.dynamics import h5md
from tests import worker_jobs

Chem = pytest.importorskip("rdkit.Chem")
ROOT = Path(__file__).parents[3]
SPICE = ROOT / "tests/data/spice_1.1.4_small.hdf5"
# The program of the process, whose parsers crash or hang on marked input.
PROGRAM = f"""
import os, sys, time
import h5py  # the limit of a request does not include these imports, which are slow on busy computers
from rdkit import Chem
sys.path.insert(0, {str(ROOT)!r})
from mlip_jax.datasets.isolation import program

def with_faults(parser):
    def parse(*parts):
        for part in parts:
            if b"crash" in part or b"[Cr]" in part:
                os.abort()
            if part == b"13":  # conformers
                os.abort()
            if b"hang" in part or b"[Hg]" in part:
                time.sleep(60)
        return parser(*parts)
    return parse

for name, parser in list(program.PARSERS.items()):
    program.PARSERS[name] = with_faults(parser)
program._serve()
"""


@pytest.fixture(scope="module")
def parsers():
    return process.ParserProcess()


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Make the parsers crash or hang on marked input."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(process, "_PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(process, "SECONDS", 1.0)
    monkeypatch.setattr(files, "SECONDS", 1.0)
    parsers = process.ParserProcess()
    monkeypatch.setattr(files, "PARSERS", parsers)
    monkeypatch.setattr(molecules, "PARSERS", parsers)
    molecules.is_safe.cache_clear()
    yield
    molecules.is_safe.cache_clear()
    if parsers.process is not None:
        parsers.process.kill()


@pytest.fixture(scope="module")
def molecule():
    molecule = Chem.MolFromSmiles("C[NH3+]")
    conformer = Chem.Conformer(2)
    conformer.SetAtomPosition(1, (0.0, 0.0, 1.5))
    molecule.AddConformer(conformer)
    return molecule.ToBinary()


def test_molecules_are_parsed(molecule):
    unreadable = [b"", b"x", Chem.MolFromSmiles("C").ToBinary()]
    first, *errors, last = molecules.read_binaries([molecule, *unreadable, molecule])
    for numbers, positions, charge in (first, last):
        assert numbers.tolist() == [6, 7] and charge == 1.0
        np.testing.assert_allclose(positions, [[0, 0, 0], [0, 0, 1.5]])
    assert len(errors) == 3 and all(isinstance(error, ValueError) for error in errors)


def test_the_process_is_replaced_after_a_crash(parsers, molecule, monkeypatch):
    parsers.call("read_rdkit_binaries", molecule)
    parsers.process.kill()
    parsers.process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(parsers, "_is_ready", lambda: True)  # it ends after this check
        with pytest.raises(process.ParserDeathError, match="ended with -9"):
            parsers.call("read_rdkit_binaries", molecule)
    assert len(parsers.call("read_rdkit_binaries", molecule)) == 3


def test_stop_requests_do_not_condemn_the_next_molecule(parsers, molecule):
    """A terminal sends Ctrl-C to all processes; the next molecule used to be "corrupted"."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        parsers.call("identify_smiles", b"C")
        process_id = parsers.process.pid
        os.kill(process_id, number)
        assert parsers.call("identify_smiles", b"CCO") == [b"CCO"]
        assert parsers.process.pid == process_id
    parsers.process.kill()  # as if the memory of the computer were exhausted
    parsers.process.wait()
    assert parsers.call("identify_smiles", b"CCO") == [b"CCO"]


def test_the_process_of_a_killed_parent_ends(faulty):
    """A file that a parser reads forever used to occupy a core until the next restart."""
    parsers = files.PARSERS
    parsers.call("identify_smiles", b"C")
    parsers.process.stdin.write(process.pack([b"identify_smiles", b"0.2", b"[Hg]"]))
    parsers.process.stdin.flush()
    assert parsers.process.wait(timeout=30) == -signal.SIGALRM


def test_a_failed_start_is_no_fault_of_the_input(monkeypatch, tmp_path):
    parsers = process.ParserProcess()
    monkeypatch.setattr(process, "_PROGRAM", tmp_path / "missing.py")
    with pytest.raises(OSError, match=r"cannot be started \(it ended with"):
        parsers.call("identify_smiles", b"C")
    monkeypatch.setattr(process.sys, "executable", "/no/python")
    with pytest.raises(OSError, match=r"cannot be started \(No such file"):
        parsers.call("identify_smiles", b"C")


@pytest.mark.parametrize(
    "reply",
    [b"", b"\xff" * 8, b"\xff" * 16, bytes(8), program.pack([b"x"]), program.pack([b"error"])],
)
def test_replies_of_a_corrupted_process_are_errors(monkeypatch, tmp_path, reply):
    """Detects a reply without end, or another error than that of a process that died."""
    (tmp_path / "program.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from mlip_jax.datasets.isolation.program import pack\n"
        "os.write(1, pack([b'started'])); os.read(0, 9)\n"
        f"while True: os.write(1, {reply!r} or sys.exit())"
    )
    monkeypatch.setattr(process, "_PROGRAM", tmp_path / "program.py")
    parsers = process.ParserProcess()
    with pytest.raises(process.ParserDeathError):
        parsers.call("identify_smiles", b"C")
    assert parsers.process is None


def test_a_lower_limit_of_the_memory_is_kept():
    """With `ulimit -v`, each file was corrupted: its process could not raise its limit."""
    limit = 2**32
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}));"
        "from mlip_jax.datasets.isolation.process import PARSERS;"
        "assert PARSERS.call('identify_smiles', b'CCO') == [b'CCO']"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_corrupted_molecules_are_errors(molecule):
    rng = np.random.default_rng(0)
    binaries = []
    for _ in range(100):
        damaged = bytearray(molecule)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(256)
        binaries.append(bytes(damaged))
    *results, last = molecules.read_binaries([*binaries, molecule])
    assert len(results) == 100 and last[2] == 1.0


def test_a_molecule_that_crashes_the_parser_is_named(faulty, molecule):
    conformers = [geom_files.RDKitMolecule(b) for b in (molecule, b"crash", molecule)]
    geom_files.parse_molecules(conformers)
    with pytest.raises(DatasetError, match="a.pickle#1: RDKit cannot read.*ended with -6"):
        conformers[1].atoms("a.pickle#1")
    assert [conformers[k].atoms("")[2] for k in (0, 2)] == [1.0, 1.0]


def test_a_smiles_that_crashes_or_hangs_is_skipped(faulty, tmp_path, caplog):
    (tmp_path / "a.smi").write_text("C good\n[Cr] crashes\n[Hg] hangs\nO good\n")
    records = list(read_molecules(tmp_path / "a.smi", num_processes=1))
    assert [record.atoms is None for record in records] == [False, True, True, False]
    assert "a.smi line 2: RDKit crashes on the SMILES '[Cr]', or hangs" in records[1].failure
    assert "'[Hg]'" in caplog.text and "no result within 1 s" in caplog.text
    identity.molecule_identity.cache_clear()
    assert identity.molecule_identity("OC.[Cr]") == "OC.[Cr]"  # as written
    assert identity.molecule_identity("OC") == "CO"


def test_a_molecule_that_crashes_the_embedding_is_reported(faulty):
    """Without worker processes, RDKit's embedding used to run in this process."""
    entry = embedding.Entry(0, "a.smi line 1", "", "CC")
    jobs = [(entry, embedding.EmbeddingOptions(count)) for count in (13, 1)]
    with ThreadPoolExecutor(1) as threads:
        for run in (map, threads.map):
            records, (record,) = run(embedding.embed_entry, jobs)
            assert {r.failure for r in records} == {
                "a.smi line 1: RDKit crashed on it, hung, or needed too much memory"
            }
            assert len(records) == 13 and record.geometry == "embedded" and len(record.atoms) == 8


@pytest.mark.parametrize(
    "fault, reason", [("crash", "ended with -6"), ("hang", "no result within")]
)
def test_a_file_that_kills_its_parser_is_rejected(faulty, tmp_path, fault, reason):
    """The check of a file precedes its opening, and the detection of its format."""
    path, database = tmp_path / f"{fault}.hdf5", tmp_path / f"{fault}.db"
    shutil.copy(SPICE, path)
    with ase.db.connect(database) as connection:
        connection.write(Atoms("H"))
    for read, file in ((Hdf5File, path), (readers.detect, path), (AseDatabase, database)):
        start = time.monotonic()
        with pytest.raises(DatasetError, match=f"{file.name}: .* cannot read the file.*{reason}"):
            read(file)
    assert time.monotonic() - start < 30
    shutil.copy(SPICE, tmp_path / "good.hdf5")
    with Hdf5File(tmp_path / "good.hdf5") as opened:
        assert len(opened)


def test_a_trajectory_that_kills_its_parser_is_rejected(faulty, tmp_path):
    """A trajectory of other people used to be opened in this process, one of this process still is."""
    atoms = Atoms("H", info={"step": 0, "time_fs": 0.0})
    atoms.calc = SinglePointCalculator(atoms, energy=0.0)
    path = tmp_path / "crash.h5"
    h5md.append(path, [atoms])
    assert len(h5md.read(path)) == h5md.size(path) == 1
    # the same inode, as that of a removed file often is
    path.write_bytes(path.read_bytes())
    for use in (h5md.read, h5md.size, lambda path: h5md.append(path, [atoms])):
        with pytest.raises(OSError, match="cannot read the file .*ended with -6"):
            use(path)


@pytest.mark.slow
def test_a_shard_that_crashes_its_worker_is_an_error(tmp_path, monkeypatch):
    """Large files are read by worker processes. A crash names the records."""
    monkeypatch.setattr(files, "SMALL_HDF5", 0)
    monkeypatch.setattr(conversion, "convert_shard", worker_jobs.crash_at_second_shard)
    spec = conversion.ConversionSpec(str(SPICE), atoms_per_shard=1)
    with pytest.raises(DatasetError, match="records 1 to 1 crashed, or took too long"):
        conversion.convert(spec, tmp_path / "store", num_processes=1, progress=False)
    assert len(list((tmp_path / "store/shards").glob("*.safetensors"))) == 1


def test_chunks_without_values_are_rejected(tmp_path):
    """Detects the search for millions of chunks that a small file states."""
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("x", (3_000_000,), "f4", chunks=(1,))
        file.create_dataset("y", data=np.zeros(200_000), chunks=(1000,), compression="gzip")
    with Hdf5File(tmp_path / "a.hdf5") as file:
        with pytest.raises(DatasetError, match="x: an array of 3,000,000 chunks with 0 bytes"):
            file["x"].read()
        assert file["y"].read().shape == (200_000,)


def test_databases_run_no_code_of_extensions(tmp_path):
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(Atoms("H"))
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("ALTER TABLE systems RENAME TO old")
        connection.execute("CREATE VIRTUAL TABLE systems USING fts4(numbers, positions)")
    with pytest.raises(DatasetError, match="without the tables of an ASE database"):
        AseDatabase(tmp_path / "a.db")
