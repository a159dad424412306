"""Tests for .npz files of any author: names, units, padding, common values and errors."""

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.reader import DatasetError, ReadReport

HARTREE, BOHR = 27.211386245988, 0.529177210903


@pytest.fixture
def arrays(sample):
    return dict(np.load(sample("npz")[0]))


def read(path, report=None, **options):
    with readers.open_data(path, **options) as source:
        return list(source.read(range(len(source)), report or ReadReport()))


def save(folder, **arrays):
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def test_padding_is_removed(sample, arrays):
    waters, hydrogen = read(sample("npz")[0])[:2], read(sample("npz")[0])[2]
    assert hydrogen.numbers.tolist() == [1, 1] and hydrogen.molecule == "H2"
    np.testing.assert_array_equal(hydrogen.forces, arrays["forces"][2, :2])
    assert [s.energy for s in waters] == [-2078.25, -2078.5] and waters[0].molecule == "H2O"


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"atomic_numbers": "z", "positions": "R", "energy": "E", "forces": "F"},
        {"positions": "my_x", "atomic_numbers": "my_z", "energy": "my_e", "forces": "my_f"},
    ],
)
def test_any_names(tmp_path, arrays, names):
    """Files with other names than those of published data sets used to be of no known format."""
    path = save(tmp_path, **{names.get(k, k): v for k, v in arrays.items()})
    options = {}
    if "my_x" in names.values():
        with pytest.raises(DatasetError, match="any known data set"):
            read(path)
        with pytest.raises(DatasetError, match="numbers_key=NAME"):
            read(path, name="npz")
        options = {"positions_key": "my_x", "numbers_key": "my_z"}
        options |= {"energy_key": "my_e", "forces_key": "my_f", "name": "npz"}
    (first, *_) = read(path, **options)
    assert first.energy == -2078.25 and first.forces[2, 2] == 8


def test_units_and_gradients(tmp_path, arrays):
    path = save(tmp_path, **arrays)
    options = {"energy_unit": "hartree", "length_unit": "bohr", "forces_are_gradients": True}
    first = read(path, **options)[0]
    assert first.energy == pytest.approx(-2078.25 * HARTREE)
    assert first.positions[0, 2] == pytest.approx(0.119 * BOHR)
    assert first.forces[2, 2] == pytest.approx(-8 * HARTREE / BOHR)
    with pytest.raises(ConfigError, match="kcal"):
        read(path, energy_unit="kcal")


def test_values_common_to_all_structures(tmp_path, arrays):
    arrays |= {"atomic_numbers": np.array([8, 1, 1]), "cell": 9 * np.eye(3), "charge": np.array(1)}
    structures = read(save(tmp_path, **arrays, multiplicity=np.array([2, 4, 2])))
    assert all(s.numbers.tolist() == [8, 1, 1] and s.charge == 1 for s in structures)
    assert [s.spin for s in structures] == [1, 3, 1]  # spins used to be read as 0
    with pytest.raises(DatasetError, match="does not fit 9 electrons"):
        read(save(tmp_path, **arrays, spin_multiplicity=np.array([2, 1, 2])))
    assert structures[2].cell[0, 0] == 9 and structures[2].pbc.all()


def test_molecules_properties_and_unread_arrays(tmp_path, arrays):
    pytest.importorskip("rdkit")
    arrays |= {"smiles": np.array(["O", "[H]O[H]", "[H][H]"]), "total_charge": np.array([0, 1, 0])}
    path = save(tmp_path, **arrays, mu=np.ones((3, 3)), stress=np.ones(3))
    report = ReadReport()
    structures = read(path, report, property_keys="mu")
    assert [s.molecule for s in structures] == ["O", "O", "[H][H]"]
    assert [s.charge for s in structures] == [0, 1, 0]
    assert structures[0].properties["mu"].tolist() == [1, 1, 1]
    assert report.unread == {"stress": 3}


def test_missing_labels_and_skipped_rows(tmp_path, arrays):
    arrays["positions"][0, 0, 0] = np.nan
    arrays["atomic_numbers"][1] = -1
    report = ReadReport()
    path = save(tmp_path, **{k: arrays[k] for k in ("atomic_numbers", "positions")})
    (structure,) = read(path, report)
    assert np.isnan(structure.energy) and structure.forces is None
    assert report.skipped == {"positions not finite": 1, "no atoms": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": np.zeros(2)}, r"energy must have shape \(3,\)"),
        ({"forces": np.zeros((3, 2, 3))}, "forces must have shape"),
        ({"positions": np.zeros((9, 3))}, "positions must have shape"),
        ({"energy": np.array([{}, {}, {}])}, "Python objects"),
    ],
)
def test_unexpected_arrays_are_reported(tmp_path, arrays, changes, message):
    with pytest.raises(DatasetError, match=message):
        read(save(tmp_path, **arrays | changes), name="npz")
