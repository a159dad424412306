"""Tests for charge and unpaired electrons in the info of ASE atoms."""

import pytest
from ase import Atoms

from mlip_jax.structure import electronic_value


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
