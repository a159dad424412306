"""Tests for limits: a small file of other people cannot take much time or memory.

Each case would otherwise read, allocate or loop over the size that the file states.
"""

import gzip
import pickle
import sqlite3
import time

import ase.db
import numpy as np
import pytest
from ase import Atoms

from mlip_jax import limits, models, potential, predictor
from mlip_jax.checkpoint import CheckpointError, Restored
from mlip_jax.datasets.formats import qm9_records, safe_pickle, xyz
from mlip_jax.datasets.molecules.files import read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.readers import ase as ase_reader
from mlip_jax.datasets.readers import npz as npz_reader
from mlip_jax.graphs.neighbors import neighbor_list
from mlip_jax.structure import cell_problem


def molecules(path):
    return list(read_molecules(path, num_processes=1))


LONG = "x" * 200
FILES = {
    "a.smi": (f"C {LONG}\n", molecules),
    "a.csv": (f"smiles,name\nC,{LONG}\n", molecules),
    "a.sdf": (f"{LONG}\n", molecules),
    "a.xyz": (f"1\n{LONG}\nH 0 0 0\n", molecules),
    "b.xyz": (f"1\nenergy=0 name={LONG}\nH 0 0 0\n", ase_reader.Reader),
}


@pytest.mark.parametrize("name", FILES)
def test_long_lines_are_rejected(tmp_path, monkeypatch, name):
    text, read = FILES[name]
    (tmp_path / name).write_text(text)
    monkeypatch.setenv("MLIP_JAX_MAX_LINE_BYTES", "100")
    with pytest.raises(DatasetError, match=f"{name}.*MLIP_JAX_MAX_LINE_BYTES"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "name, read",
    [("a.xyz.gz", molecules), ("a.xyz.gz", ase_reader.Reader), ("a.smi.gz", molecules)],
)
def test_compressed_files_do_not_expand_without_end(tmp_path, monkeypatch, name, read):
    monkeypatch.setattr(limits, "SMALL", 1000)
    with gzip.open(tmp_path / name, "wt") as file:
        file.write("\n" * 100_000)
    with pytest.raises(DatasetError, match="bytes per compressed byte"):
        read(tmp_path / name)


def test_frames_of_too_many_atoms_are_rejected(tmp_path):
    (tmp_path / "a.xyz").write_text("10000000\n\nH 0 0 0\n")
    for read in (molecules, ase_reader.Reader):
        with pytest.raises(DatasetError, match="atoms of one structure"):
            read(tmp_path / "a.xyz")


def test_rows_of_npz_files_are_limited(tmp_path, monkeypatch):
    np.savez_compressed(
        tmp_path / "a.npz", R=np.zeros((2, 50, 3)), z=np.ones(50, int), E=np.zeros(2)
    )
    monkeypatch.setenv("MLIP_JAX_MAX_ARRAY_BYTES", "1000")
    with pytest.raises(DatasetError, match="R: .*MLIP_JAX_MAX_ARRAY_BYTES"):
        list(npz_reader.Reader(tmp_path / "a.npz"))


def test_computed_values_of_databases_are_limited(tmp_path, monkeypatch):
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(Atoms("H"), data={"energy": 1.0})
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("ALTER TABLE systems DROP COLUMN positions")
        connection.execute("ALTER TABLE systems ADD positions BLOB AS (zeroblob(100000))")
    monkeypatch.setenv("MLIP_JAX_MAX_ARRAY_BYTES", "90000")
    with pytest.raises(DatasetError, match="too big"):
        ase_reader.Reader(tmp_path / "a.db")


def test_thin_cells_are_rejected(monkeypatch):
    """Detects the enumeration of 10¹² periodic images, and a limit that cannot be raised."""
    cell = np.diag([0.001] * 3)
    assert cell_problem(cell, np.ones(3, bool)) == "lattice planes closer than 0.1 Å"
    with pytest.raises(ValueError, match="MLIP_JAX_MAX_IMAGE_ATOMS"):
        neighbor_list(np.zeros((1, 3)), 5.0, cell, np.ones(3, bool))
    cubic = (np.zeros((1, 3)), 5.0, np.diag([4.0] * 3), np.ones(3, bool))
    monkeypatch.setenv("MLIP_JAX_MAX_IMAGE_ATOMS", "10")
    with pytest.raises(ValueError, match="limit of 10. .*MLIP_JAX_MAX_IMAGE_ATOMS to a larger"):
        neighbor_list(*cubic)
    monkeypatch.setenv("MLIP_JAX_MAX_IMAGE_ATOMS", "1000")
    assert len(neighbor_list(*cubic).senders) == 6


@pytest.mark.parametrize(
    "name, options",
    [
        ("painn", {"num_layers": 3_000_000}),
        ("equivariant_transformer", {"num_knots": 10**9}),
        ("so3krates", {"degrees": (60,)}),
        ("nequip", {"energy_widths": [1] * 1_000_000}),
    ],
)
def test_options_of_checkpoints_are_limited(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} of '{name}'.*MLIP_JAX_MAX_"):
        models.create(name, **options)


def test_nested_sets_of_pickles_are_rejected():
    """Detects a pickle of 300 bytes whose value takes forever to print."""
    code = b"\x80\x04(\x91\x94"  # an empty frozenset, then sets of tuples of two references
    for level in range(40):
        code += b"(h%c" % level + b"h%c\x86\x91\x94" % level
    with pytest.raises(DatasetError, match="cells|does not exist"):
        safe_pickle.loads(code + b".", allowed={}, source="a.pickle")
    assert safe_pickle.loads(
        pickle.dumps(frozenset({("a", 1)})), allowed={}, source="a.pickle"
    ) == frozenset({("a", 1)})


def test_a_smiles_has_a_limit(tmp_path):
    (tmp_path / "a.smi").write_text("C" * 20_000 + "\n")
    (record,) = molecules(tmp_path / "a.smi")
    assert "20,000 characters of one SMILES" in record.failure


def test_a_limit_is_a_number(monkeypatch):
    monkeypatch.setenv("MLIP_JAX_MAX_LINE_BYTES", "1e9")
    with pytest.raises(ValueError, match="MAX_LINE_BYTES=1e9: expected a positive integer"):
        limits.limit("line_bytes")


def test_invalid_metadata_of_checkpoints_are_checkpoint_errors(monkeypatch):
    model = {"name": "painn", "options": {"num_layers": 10**9}}
    for module, kind in ((potential, potential.Potential), (predictor, predictor.Predictor)):
        for metadata in (
            {"config": {"task": predictor.TASK, "model": model}, "statistics": {}},
            {"config": {"task": predictor.TASK}, "statistics": {"reference_energies": []}},
        ):
            if kind is potential.Potential and not metadata["statistics"]:
                metadata["statistics"] = {"reference_energies": [], "cutoff": "x"}
            restored = Restored(1, {}, metadata)
            monkeypatch.setattr(module, "read_checkpoint", lambda path, r=restored: r)
            with pytest.raises(CheckpointError, match="run: invalid metadata"):
                kind.load("run")


@pytest.mark.parametrize(
    "comment",
    ["a=" + "[" * 100_000, "a" * 100_000, " " * 100_000, '"' * 100_000, "energy=" + "9" * 99_999],
)
def test_the_time_for_a_comment_line_is_linear(comment):
    """A line of 80 kB took 45 s, and one of 16 MB would have taken 20 days."""
    start = time.process_time()
    xyz.label_names(comment.encode())
    qm9_records.comment_fields(comment)
    xyz.comment_energy("ORCA E " * 5000 + comment)
    assert time.process_time() - start < 1


def test_names_of_labels_in_a_comment_line():
    comment = b'Lattice="1 0 0" a = 1 "b c"=2 d energy=-1.5 Properties=species:S:1:pos:R:3'
    assert xyz.label_names(comment) == [
        "Lattice",
        "a",
        "b c",
        "energy",
        "Properties",
        "species",
        "pos",
    ]
    assert qm9_records.comment_fields('a=1 b="2 3" c d=e=f') == {"a": "1", "b": "2 3", "d": "e=f"}
