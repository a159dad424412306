"""Tests for total charges: a label takes precedence, and partial charges are not total charges."""

import numpy as np
import pytest

from mlip_jax.datasets.charges import total_charge


@pytest.mark.parametrize(
    "label, smiles, initial, expected",
    [
        (-1, "C[NH3+]", 2.0, -1.0),
        (np.float32(2), "", 0.0, 2.0),
        (float("nan"), "C[NH3+]", 0.0, 1.0),
        (None, "", 0.9995, 1.0),
        ("-1", "", -1.0, -1.0),
        (None, "", 0.4, 0.0),  # partial charges
        (None, "", float("nan"), 0.0),
        (float("inf"), "C", 0.0, float("inf")),  # for the checks to report, not to be replaced
    ],
)
def test_total_charge(label, smiles, initial, expected):
    assert total_charge(label, smiles, initial) == expected
