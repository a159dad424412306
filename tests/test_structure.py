"""Tests for charge and unpaired electrons in the info of ASE atoms."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write

from mlip_jax.datasets.molecules.files import read_molecules
from mlip_jax.datasets.readers import open_data
from mlip_jax.structure import electronic_state, electronic_value


@pytest.mark.parametrize("value", ["many", None, float("nan"), [1, 2]])
def test_values_that_are_not_finite_numbers_are_errors(value):
    with pytest.raises(
        ValueError, match=r"atoms.info\['charge'\] must be a finite number, received"
    ):
        electronic_value(Atoms("H", info={"charge": value}), "charge")


def test_electronic_values_are_read_from_info():
    atoms = Atoms("H", info={"num_unpaired_electrons": "1"})
    assert (
        electronic_value(atoms, "num_unpaired_electrons") == 1.0
        and electronic_value(atoms, "charge") == 0.0
    )


@pytest.mark.parametrize(
    ("info", "unpaired"),
    [
        ({"spin": 1}, 1),
        ({"multiplicity": 2}, 1),
        ({"spin": 3, "total_charge": 1}, 2),
        ({"spin": float("nan")}, 0),
        ({"spin": 0.5, "num_unpaired_electrons": 3}, 3),
    ],
)
def test_a_spin_under_another_name_is_not_ignored(info, unpaired):
    """Detects radicals with such labels that are treated as closed shells."""
    atoms = Atoms("NO", info=info)
    assert electronic_value(atoms, "num_unpaired_electrons") == unpaired
    assert electronic_state(atoms).get("num_unpaired_electrons", 0) == unpaired


@pytest.mark.parametrize("suffix", ["", ".xyz", ".db", ".traj"])
def test_initial_magnetic_moments_state_the_unpaired_electrons(tmp_path, suffix):
    """Radicals of ase.build.molecule were treated as closed shells, in Python and in files."""
    radical, crystal = molecule("NO"), bulk("Fe")
    crystal.set_initial_magnetic_moments([2.3])
    structures = [radical, molecule("O2"), molecule("H2O"), crystal]
    expected = [1, 2, 0, 0]
    if suffix:
        path = tmp_path / f"in{suffix}"
        write(path, structures)
        records = list(read_molecules(str(path), num_processes=1))
        assert not any(record.failure for record in records)
        with open_data(path, "ase", energy_key="", forces_key="") as reader:
            assert [s.spin for s in reader] == expected
        structures = [record.atoms for record in records]
    assert [electronic_value(a, "num_unpaired_electrons") for a in structures] == expected
    assert [electronic_state(a).get("num_unpaired_electrons", 0) for a in structures] == expected


def test_moments_that_do_not_fit_are_ignored_with_a_warning():
    atoms = molecule("NO")
    atoms.info["charge"] = 1
    with pytest.warns(UserWarning, match="add up to 1 do not fit the number of electrons"):
        assert electronic_value(atoms, "num_unpaired_electrons") == 0
    atoms.info["multiplicity"] = 3
    assert electronic_value(atoms, "num_unpaired_electrons") == 2
    unknown = molecule("H2O")
    unknown.set_initial_magnetic_moments([np.nan, 0.0, 0.0])
    with pytest.warns(UserWarning, match="add up to nan do not fit"):
        assert electronic_value(unknown, "num_unpaired_electrons") == 0


def test_a_spin_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="'multiplicity' is 1, which does not fit 15 electrons"):
        electronic_value(Atoms("NO", info={"multiplicity": 1}), "num_unpaired_electrons")
