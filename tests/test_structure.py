"""Tests for charge and unpaired electrons in the info of ASE atoms."""

import pytest
from ase import Atoms

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


def test_a_spin_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="'multiplicity' is 1, which does not fit 15 electrons"):
        electronic_value(Atoms("NO", info={"multiplicity": 1}), "num_unpaired_electrons")
