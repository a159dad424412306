"""Tests that every reader must pass. samples/<reader>.py creates a small file for a new reader."""

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.reader import DatasetError, Reader, ReadReport

ALL = readers.names()


def structures(path, name, options, records=None):
    with readers.open_data(path, name, **options) as source:
        report = ReadReport()
        actual = list(source.read(range(len(source)) if records is None else records, report))
        assert report.structures == len(actual)
        return actual, report, len(source)


@pytest.mark.parametrize("name", ALL)
def test_format_is_detected(name, sample):
    path, _ = sample(name)
    assert readers.detect(path) == name


@pytest.mark.parametrize("name", ALL)
def test_structures_are_valid(name, sample):
    path, options = sample(name)
    actual, report, length = structures(path, name, options)
    assert len(actual) >= 2 and report.records == length
    assert sum(report.skipped.values()) == len(report.identities)
    for s in actual:
        assert s.numbers.ndim == 1 and len(s) >= 1 and ((s.numbers > 0) & (s.numbers < 119)).all()
        assert s.positions.dtype == np.float64 and np.isfinite(s.positions).all()
        assert s.forces is None or s.forces.dtype == np.float64
        assert isinstance(s.energy, float)
        assert s.molecule and path.stem.split(".")[0] in s.source or s.source
        assert 0 <= s.record < length and s.conformer >= 0
        for value in s.properties.values():
            assert np.asarray(value).dtype.kind in "fiub"
        for value in s.atom_properties.values():
            assert len(value) == len(s)
        if len(s) > 1:
            d = np.linalg.norm(s.positions[:, None] - s.positions[None], axis=-1)
            nearest = (d + 99 * np.eye(len(s))).min()
            assert 0.5 < nearest < 3.0, f"{s.source}: the shortest distance is {nearest} Å"
    assert len({(s.record, s.conformer) for s in actual}) == len(actual)


@pytest.mark.parametrize("name", ALL)
def test_record_ranges_equal_the_whole(name, sample):
    """Reading ranges of records, also with a new reader for each, equals reading the whole file."""
    path, options = sample(name)
    whole, _, length = structures(path, name, options)
    cuts = sorted({0, 1, length // 2, length})
    apart = [
        s for a, b in zip(cuts, cuts[1:]) for s in structures(path, name, options, range(a, b))[0]
    ]
    with readers.open_data(path, name, **options) as source:
        along = [s for a, b in zip(cuts, cuts[1:]) for s in source.read(range(a, b), ReadReport())]
    for other in (apart, along):
        assert [(s.record, s.conformer, s.molecule, s.source) for s in other] == [
            (s.record, s.conformer, s.molecule, s.source) for s in whole
        ]
        for a, b in zip(other, whole):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_equal(a.energy, b.energy)


@pytest.mark.parametrize("name", ALL)
def test_reader_states_level_of_theory_and_units(name, sample):
    reader = readers.get(name)
    assert issubclass(reader, Reader) and reader.LEVEL_OF_THEORY and "positions" in reader.UNITS
    module = __import__(reader.__module__, fromlist=["__doc__"])
    assert len(module.__doc__.splitlines()) > 5, (
        "the module's docstring gives the layout and its source"
    )
    path, options = sample(name)
    with readers.open_data(path, name, **options) as source:
        assert (
            source.level_of_theory and source.files() and all(f.is_file() for f in source.files())
        )


@pytest.mark.parametrize("name", ALL)
def test_missing_files_and_unknown_options_are_reported(name, sample, tmp_path):
    with pytest.raises(DatasetError, match="nowhere: no such file"):
        readers.open_data(tmp_path / "nowhere", name)
    with pytest.raises(ConfigError, match="'no_such_option'"):
        readers.open_data(sample(name)[0], name, no_such_option=1)


@pytest.mark.parametrize("name", ALL)
def test_other_files_are_rejected_with_a_message(name, tmp_path):
    """Any other or empty file raises DatasetError."""
    for content in (b"", b"<html>404 not found</html>" * 40, bytes(range(256)) * 20):
        path = tmp_path / "strange.bin"
        path.write_bytes(content)
        assert not readers.get(name).matches(path)
        with pytest.raises(DatasetError, match="strange"):
            with readers.open_data(path, name) as source:
                list(source)


def test_unknown_reader_and_unknown_format_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'spice'"):
        readers.get("spicee")
    (tmp_path / "a.bin").write_bytes(bytes(100))
    with pytest.raises(DatasetError, match="any known data set.*config.data.reader"):
        readers.detect(tmp_path / "a.bin")
