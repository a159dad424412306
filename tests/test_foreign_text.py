"""Tests for text of other people in tables, frames, entries, pages and logs."""

import csv
import io
import logging

import pytest
from ase import Atoms
from ase.io import read
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.cli import console
from mlip_jax.datasets.molecules.files import read_molecules
from mlip_jax.datasets.smiles.embedding import EmbeddingOptions, Entry, MoleculeRecord, embed_entry
from mlip_jax.foreign_text import TableWriter, from_cell, one_line, printable, table_rows, to_cell
from mlip_jax.reports import html_page
from mlip_jax.simulation.relaxation import journal, outputs
from mlip_jax.simulation.relaxation.relax import Relaxation

HOSTILE = (
    '=HYPERLINK("http://a")',
    "@SUM(A1)",
    "-2+3",
    "\t=1",
    "$$$$",
    ">  <index>",
    "M  END",
    "x\n1\nenergy=0\nH 0 0 0",
    'a" energy="1',
    "\x1b[2J\x1b]0;title\x07",
    "\u202eevil",
    "<script>alert(1)</script>",
)


@settings(max_examples=50)
@given(st.text(st.sampled_from("'=+-@\t\r1.e aC"), max_size=6))
def test_cells_round_trip_and_are_not_formulas(text):
    cell = to_cell(text)
    assert from_cell(cell) == text
    if cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        float(cell)


@pytest.mark.parametrize("smiles", ["=C", "@C", "-C", "'=C", "C", "-1.5"])
def test_a_table_returns_its_smiles(tmp_path, smiles):
    """Detects a table of results whose molecules change when it becomes the next input."""
    with open(tmp_path / "a.csv", "w", newline="") as file:
        TableWriter(file).writerows([["smiles", "name"], [smiles, smiles]])
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(table_rows(file)) == [{"smiles": smiles, "name": smiles}]
    (record,) = read_molecules(tmp_path / "a.csv", num_processes=1)
    assert (record.smiles, record.name) == (smiles, smiles)


@pytest.mark.parametrize("text", HOSTILE)
def test_names_stay_within_their_records(text):
    """Detects names that begin new rows, frames, entries or fields, or are run."""
    line = journal.encode_line([journal.encode_cell(text)]).decode()
    ((cell,),) = csv.reader(io.StringIO(line))
    assert cell == to_cell(one_line(text)) and cell[:1] not in "=+-@\t\r"
    frame = outputs.frame(Atoms("H"), {"name": text}, 1.0).decode()
    (atoms,) = read(io.StringIO(frame), ":", format="extxyz")
    assert atoms.info["name"] == one_line(text) and atoms.get_potential_energy() == 1.0
    page = html_page.render(text, [html_page.paragraph(text)])
    assert "<script>alert" not in page
    assert printable(text).replace("\n", "").replace("\t", "").isprintable()


@pytest.mark.parametrize("text", ["$$$$", ">  <index>", "M  END", "x\n$$$$\n"])
def test_entries_of_sdf_files_contain_their_names(text):
    from rdkit import Chem

    (record,) = embed_entry((Entry(0, "", "", "C"), EmbeddingOptions()))
    record = MoleculeRecord(0, text, text, record.atoms, bonds=record.bonds)
    result = Relaxation(record.atoms, "converged")
    entries = Chem.SDMolSupplier()
    entries.SetData(outputs.mol_block(record, result).decode() * 2)
    assert len(entries) == 2
    assert entries[1].GetProp("status") == "converged"
    assert entries[0].GetProp("index") == "0"


def test_names_do_not_control_the_terminal():
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s\nfailed", ("\x1b[2J",), None)
    assert console.PrintableFormatter("%(message)s").format(record) == "\\x1b[2J\nfailed"
