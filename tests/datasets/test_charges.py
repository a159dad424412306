"""Tests for total charges: a label takes precedence, and partial charges are not total charges."""

import numpy as np
import pytest
from ase import Atoms

from mlip_jax.datasets.charges import total_charge
from mlip_jax.state_labels import ElectronicStateError, find_charge, find_unpaired
from mlip_jax.structure import electronic_state, electronic_value


@pytest.mark.parametrize(
    "label, smiles, initial, expected",
    [
        (-1, "C[NH3+]", 2.0, -1.0),
        (np.float32(2), "", 0.0, 2.0),
        (float("nan"), "C[NH3+]", 0.0, 1.0),
        (None, "", 0.9995, 1.0),
        (None, "", 0.4, 0.0),  # partial charges
        (None, "", float("nan"), 0.0),
        (float("inf"), "C", 0.0, float("inf")),  # for the checks to report, not to be replaced
    ],
)
def test_total_charge(label, smiles, initial, expected):
    assert total_charge(label, smiles, initial) == expected


@pytest.mark.parametrize(
    "labels, expected",
    [
        ({"total_charge": 1, "energy": -3.0}, 1.0),
        ({"Charge": np.int64(-1)}, -1.0),
        ({"REF_charge": [2.0]}, 2.0),
        ({"netCharge": "-1"}, -1.0),
        ({"charges": 1.0, "spin": 1}, None),
        ({"charge": np.zeros(3)}, None),  # partial charges
        ({"charge": 1, "total_charge": 1.0}, 1.0),
        ({"charge": float("nan"), "total_charge": 1.0}, 1.0),
    ],
)
def test_a_charge_is_found_under_its_usual_names(labels, expected):
    """Ions with total_charge or Charge used to become neutral without a word."""
    assert find_charge(labels) == expected


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"charge": True}, "'charge' is True, expected a number"),
        ({"charge": np.bool_(False)}, "expected a number"),
        ({"charge": "plus"}, "'charge' is 'plus', expected a number"),
        ({"charge": 0, "total_charge": 1}, "charge = 0, total_charge = 1"),
    ],
)
def test_invalid_charges_are_errors(labels, message):
    with pytest.raises(ElectronicStateError, match=message):
        find_charge(labels)


OXYGEN, METHYL = np.array([8, 8]), np.array([6, 1, 1, 1])


@pytest.mark.parametrize(
    "labels, numbers, charge, expected",
    [
        ({"num_unpaired_electrons": 2}, OXYGEN, 0, 2),
        ({"multiplicity": 3}, OXYGEN, 0, 2),
        ({"spin": 3}, OXYGEN, 0, 2),  # 2S + 1
        ({"spin": 2}, OXYGEN, 0, 2),  # 2S
        ({"spin": 0.5}, METHYL, 0, 1),  # S
        ({"spin": 1}, METHYL, 0, 1),
        ({"spin": 1}, METHYL, 1, 0),
        ({"Multiplicity": "2"}, METHYL, 0, 1),
        ({"uhf": 1, "multiplicity": 2}, METHYL, 0, 1),
        ({}, METHYL, 0, None),
    ],
)
def test_unpaired_electrons_are_found_under_their_usual_names(labels, numbers, charge, expected):
    assert find_unpaired(labels, numbers, charge) == expected


@pytest.mark.parametrize(
    "labels", [{"multiplicity": 2}, {"spin": 0.5}, {"spin": -1}, {"uhf": "x"}, {"spin": np.inf}]
)
def test_spins_that_do_not_fit_are_errors(labels):
    with pytest.raises(ElectronicStateError):
        find_unpaired(labels, OXYGEN, 0)


def test_charges_of_atoms_have_the_same_names_as_those_of_files():
    """Calculators used to take an ion with info["total_charge"] for a neutral molecule."""
    atoms = Atoms("NH4", info={"total_charge": 1})
    assert electronic_value(atoms, "charge") == 1 and electronic_state(atoms) == {"charge": 1}
    atoms.info["charge"] = 0
    assert electronic_value(atoms, "charge") == 0
    assert electronic_state(Atoms("N")) == {}
