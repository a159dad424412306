"""Tests for DimeNet++ with weights of PyTorch Geometric and of DIG.

The fixtures tests/data/parity_{pyg,dig}_dimenetpp.npz are outputs in float64 of PyTorch Geometric
2.8.1 and of DIG (commit 21476b0) for small models with random weights. Both list all triplets, which
our model does not.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.importers import dimenetpp
from mlip_jax.importers.formats.weights import WeightsError
from tests.models.test_parity import assert_agree, batch_energies, energies_and_forces, read_parity

DATA = Path(__file__).parents[1] / "data"


def save(tmp_path, kind, **changes):
    """Write a weights file; return its path, the structures, and expected energies and forces."""
    state, structures, expected = read_parity(DATA / f"parity_{kind}_dimenetpp.npz")
    weights = {k: v for k, v in {**state, **changes}.items() if v is not None}
    np.savez(tmp_path / "weights.npz", **weights)
    energies, forces = (np.concatenate(expected[name]) for name in ("output", "forces"))
    return tmp_path / "weights.npz", structures, energies, forces


@pytest.mark.usefixtures("double_precision")
@pytest.mark.slow  # forces are minus the gradient of these energies: tests/models/test_contract.py
@pytest.mark.parametrize("kind", ["pyg", "dig"])
def test_forces_agree_with_the_reference(tmp_path, kind):
    path, structures, energies, forces = save(tmp_path, kind)
    potential = dimenetpp.load(path, cutoff=4.0)
    actual = energies_and_forces(potential.model, potential.params, structures)
    assert_agree(actual[0], energies)
    assert_agree(actual[1], forces)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kind", ["pyg", "dig"])
def test_energies_agree_with_the_reference(tmp_path, kind):
    """Both conventions of the angle; a wrong sign of odd degrees or a kept k = i would show."""
    path, structures, energies, _ = save(tmp_path, kind)
    potential = dimenetpp.load(path, cutoff=4.0)
    assert potential.model.angle == ("turning" if kind == "pyg" else "bond")
    assert_agree(batch_energies(potential.model, potential.params, structures), energies)


@pytest.mark.slow
def test_agrees_in_single_precision(tmp_path):
    """Closed forms of the Bessel functions would lose all digits at short distances."""
    path, structures, *expected = save(tmp_path, "pyg")
    potential = dimenetpp.load(path, cutoff=4.0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), potential.params)
    actual = energies_and_forces(potential.model, params, structures, np.float32)
    for values, reference in zip(actual, expected):
        np.testing.assert_allclose(values, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_weights_without_counterpart_are_listed(tmp_path):
    path, *_ = save(tmp_path, "pyg", **{"output_blocks.0.lin_up.bias": np.zeros(48)})
    with pytest.raises(WeightsError, match=r"1 weights have no counterpart.*lin_up\.bias"):
        dimenetpp.load(path)
    path, *_ = save(tmp_path, "pyg", **{"rbf.freq": None})
    with pytest.raises(WeightsError, match=r"'rbf\.freq' is missing"):
        dimenetpp.load(path)
