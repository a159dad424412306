"""Tests for tables of SMILES and properties."""

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.store.conversion import ConversionSpec, convert


def test_columns_of_numbers_are_properties(sample):
    """Detects text columns as properties, shifted rows, and two names of one molecule."""
    path, _ = sample("smiles_table")
    with readers.open_data(path) as source:
        report = ReadReport()
        water, methanol, again = source.read(range(len(source)), report)
    assert water.properties == {"gap": 8.5, "mu": 1.85}
    assert methanol.properties["gap"] == 7.5 and np.isnan(methanol.properties["mu"])
    assert again.record == 3 and again.molecule == methanol.molecule == "CO"
    assert report.skipped == {"SMILES cannot be embedded": 1}
    assert report.identities[0][1] == "table.csv line 4"
    with readers.open_data(path, property_keys=("mu",)) as source:
        assert next(iter(source)).properties == {"mu": 1.85}


def test_radicals_have_unpaired_electrons(tmp_path):
    (tmp_path / "radicals.csv").write_text("smiles,gap\n[CH3],1\nC,2\n")
    with readers.open_data(tmp_path / "radicals.csv") as source:
        assert [structure.spin for structure in source] == [1, 0]


def test_errors_name_the_option(sample, tmp_path):
    path, _ = sample("smiles_table")
    with pytest.raises(ConfigError, match="Did you mean 'gap'"):
        readers.open_data(path, property_keys=("gab",))
    with pytest.raises(DatasetError, match="'remark' contains no numbers"):
        readers.open_data(path, property_keys=("remark",))
    other = tmp_path / "other.csv"
    other.write_text("molecule,gap\nO,1\n")
    with pytest.raises(DatasetError, match="found: molecule, gap. Set smiles_key"):
        readers.open_data(other, "smiles_table")
    with readers.open_data(other, "smiles_table", smiles_key="molecule") as source:
        assert next(iter(source)).properties == {"gap": 1.0}


def test_isomers_that_are_not_embedded_are_no_copies(tmp_path):
    """Detects positions on a line that are the same for all isomers."""
    (tmp_path / "isomers.csv").write_text("smiles,gap\nCCO,1\nCOC,2\nCCO,3\n")
    with readers.open_data(tmp_path / "isomers.csv", embed=False) as source:
        ethanol, ether, again = (s.positions for s in source)
    assert not np.array_equal(ethanol, ether) and np.array_equal(ethanol, again)
    assert np.linalg.norm(np.diff(ether, axis=0), axis=1).min() > 1


def test_the_cell_that_is_no_number_is_named(tmp_path):
    """Detects a message that blames energies for a table whose column contains a text."""
    path = tmp_path / "bad.csv"
    path.write_text("smiles,gap\nCCO,1\n\nCC,none\nC,2\n")
    spec = ConversionSpec(str(path), options={"embed": False})
    with pytest.raises(DatasetError, match="(?s)nothing can be.*In bad.csv line 4, gap is 'none'"):
        convert(spec, tmp_path / "store", num_processes=1, progress=False)
