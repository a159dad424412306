"""Tests for PaiNN with the weights of fairchem-core and of Force2Geo.

The fixtures tests/data/parity_fairchem_painn.npz and parity_force2geo_painn.npz have random weights
in the layout of fairchem-core 1.10.0 and of Force2Geo's released code, with 12 features. Energies,
vectors of the head and forces (by complex steps) are those of a NumPy version of the equations. For
the models with 48 features that the weights are cut from, it agrees with both programs to 1e-14.
Force2Geo's energies are means over atoms, and its forces are derivatives of this mean.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.importers import painn_oc
from mlip_jax.importers.formats.weights import WeightsError
from tests.models.test_parity import assert_agree, energies_and_forces, read_parity

DATA = Path(__file__).parents[1] / "data"
HEADS = {"fairchem": "direct_forces", "force2geo": "vector_output"}
CUTOFFS = {"fairchem": 4.5, "force2geo": None}


@pytest.fixture
def weights(tmp_path):
    """Function (kind, **changes) -> (path of a weights file, structures, expected values)."""

    def make(kind, **changes):
        state, structures, expected = read_parity(DATA / f"parity_{kind}_painn.npz")
        path = tmp_path / f"{kind}.npz"
        np.savez(path, **{f"module.{name}": array for name, array in {**state, **changes}.items()})
        return path, structures, expected

    return make


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("kind", "direct"),
    [
        ("fairchem", False),
        ("fairchem", True),
        # The direct case compares the same energies, and tests/models/test_contract.py compares
        # forces with differences of energies.
        pytest.param("force2geo", False, marks=pytest.mark.slow),
        ("force2geo", True),
    ],
)
def test_agrees_with_the_reference(weights, kind, direct):
    path, structures, expected = weights(kind)
    potential = painn_oc.load(path, cutoff=CUTOFFS[kind], direct_forces=direct)
    assert potential.conservative != direct
    energies, forces = energies_and_forces(potential.model, potential.params, structures)
    atoms = np.array([len(s) for s in structures])
    if kind == "force2geo":
        energies = energies / atoms
        forces = forces if direct else forces / np.repeat(atoms, atoms)[:, None]
    assert_agree(energies, np.concatenate(expected["energy"]))
    assert_agree(forces, np.concatenate(expected[HEADS[kind] if direct else "forces"]))


@pytest.mark.slow
def test_agrees_in_single_precision(weights):
    path, structures, expected = weights("fairchem")
    potential = painn_oc.load(path, cutoff=4.5)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), potential.params)
    energies, forces = energies_and_forces(potential.model, params, structures, np.float32)
    for values, name in ((energies, "energy"), (forces, "direct_forces")):
        reference = np.concatenate(expected[name])
        np.testing.assert_allclose(values, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_energy_unit_multiplies_energies_and_forces(weights):
    path, _, _ = weights("fairchem")
    assert painn_oc.load(path, cutoff=4.5, energy_unit=2.0).energy_scale == 2.0


def test_the_vector_head_of_force2geo_is_dropped_unless_requested(weights):
    path, _, _ = weights("force2geo")
    assert painn_oc.load(path).conservative
    assert not painn_oc.load(path, direct_forces=True).conservative


def test_unfitted_scales_have_no_effect(weights):
    names = [f"upd_out_scalar_scale_{n}.scale_factor" for n in range(3)]
    path, _, _ = weights("fairchem", **dict.fromkeys(names, np.array(0.0)))
    assert painn_oc.load(path, cutoff=4.5).model.layer_scales is None


def test_elements_have_weights(weights):
    path, _, _ = weights("fairchem")
    assert painn_oc.load(path, cutoff=4.5).elements == tuple(range(1, 84))
    assert painn_oc.load(path, cutoff=4.5, elements=("O", 1)).elements == (1, 8)
    path, _, _ = weights("force2geo")
    assert painn_oc.load(path).elements == tuple(range(1, 80))
    with pytest.raises(ValueError, match="from 1 to 79"):
        painn_oc.load(path, elements=("Rn",))


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("fairchem", {}, {}, "do not contain the cutoff: give cutoff"),
        ("force2geo", {}, {"cutoff": 5.0}, "have a cutoff of 4.5 Å, received 5"),
        (
            "fairchem",
            {"extra": np.zeros(3)},
            {"cutoff": 4.5},
            "1 weights have no counterpart.*extra",
        ),
        (
            "fairchem",
            {"radial_basis.rbf.offset": np.arange(24.0) ** 2},
            {"cutoff": 4.5},
            "even grid",
        ),
        ("fairchem", {"atom_emb.weight": np.zeros((3, 3))}, {"cutoff": 4.5}, "no counterpart"),
    ],
)
def test_unsuitable_weights_are_reported(weights, kind, changes, options, message):
    path, _, _ = weights(kind, **changes)
    with pytest.raises(ValueError, match=message):
        painn_oc.load(path, **options)


def test_weights_of_another_model_are_reported(tmp_path):
    np.savez(tmp_path / "other.npz", kernel=np.zeros((2, 2)))
    with pytest.raises(WeightsError, match="other.npz: expected the state dict of PaiNN"):
        painn_oc.load(tmp_path / "other.npz")
