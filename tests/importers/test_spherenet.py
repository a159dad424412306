"""Tests for SphereNet and ComENet with weights of DIG.

The fixtures tests/data/parity_dig_{spherenet,comenet}.npz are outputs in float64 of DIG (commit
21476b0) for small models with random weights, except that torsions and azimuths that are undefined
are those of our models: DIG evaluates them, and rounding decides their values.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mlip_jax.importers import comenet, spherenet
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.structure import Structure
from tests.models.test_parity import assert_agree, batch_energies, energies_and_forces, read_parity

DATA = Path(__file__).parents[1] / "data"
IMPORTERS = {"spherenet": spherenet, "comenet": comenet}
# formamide, exactly planar; the bonds of an atom all differ in length
PLANAR = Structure(
    np.array([6, 8, 7, 1, 1, 1]),
    np.array(
        [
            [0.0, 0.0, 0.0],
            [0.5, 1.12, 0.0],
            [0.62, -1.21, 0.0],
            [-1.09, 0.06, 0.0],
            [1.63, -1.24, 0.0],
            [0.11, -2.09, 0.0],
        ]
    ),
)


def save(tmp_path, name, **changes):
    """Write a weights file; return its path, the structures, and expected energies and forces."""
    state, structures, expected = read_parity(DATA / f"parity_dig_{name}.npz")
    weights = {k: v for k, v in {**state, **changes}.items() if v is not None}
    np.savez(tmp_path / "weights.npz", **weights)
    energies, forces = (np.concatenate(expected[key]) for key in ("output", "forces"))
    return tmp_path / "weights.npz", structures, energies, forces


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", IMPORTERS)
def test_energies_agree_with_the_reference(tmp_path, name):
    """Also, rounding does not decide the energy of a planar molecule."""
    path, structures, energies, _ = save(tmp_path, name)
    potential = IMPORTERS[name].load(path, cutoff=4.0)
    turns = [np.eye(3), *Rotation.random(3, rng=np.random.default_rng(0)).as_matrix()]
    planar = [dataclasses.replace(PLANAR, positions=PLANAR.positions @ t) for t in turns]
    actual = batch_energies(potential.model, potential.params, [*structures, *planar])
    assert_agree(actual[:5], energies)
    assert_agree(actual[5:], actual[5])


@pytest.mark.slow
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", IMPORTERS)
def test_forces_agree_with_the_reference(tmp_path, name):
    path, structures, energies, forces = save(tmp_path, name)
    potential = IMPORTERS[name].load(path, cutoff=4.0)
    actual = energies_and_forces(potential.model, potential.params, structures)
    assert_agree(actual[0], energies)
    assert_agree(actual[1], forces)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTERS)
def test_agrees_in_single_precision(tmp_path, name):
    """ComENet divides by the spread over three atoms of water, which magnifies rounding of forces."""
    path, structures, *expected = save(tmp_path, name)
    potential = IMPORTERS[name].load(path, cutoff=4.0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), potential.params)
    actual = energies_and_forces(potential.model, params, structures, np.float32)
    for values, reference, relative in zip(
        actual, expected, (1e-5, 1e-4 if name == "comenet" else 1e-5)
    ):
        atol = relative * np.abs(reference).max()
        np.testing.assert_allclose(values, reference, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "lost", "left"),
    [
        ("spherenet", "update_es.1.lin_t2.weight", "update_es.0.lin_t2.bias"),
        (
            "comenet",
            "interaction_blocks.1.norm.mean_scale",
            "interaction_blocks.0.conv1.lin_root.bias",
        ),
    ],
)
def test_weights_without_counterpart_are_listed(tmp_path, name, lost, left):
    path, *_ = save(tmp_path, name, **{left: np.zeros(16)})
    with pytest.raises(WeightsError, match=rf"1 weights have no counterpart.*{left}"):
        IMPORTERS[name].load(path)
    path, *_ = save(tmp_path, name, **{lost: None})
    with pytest.raises(WeightsError, match=f"'{lost}' is missing"):
        IMPORTERS[name].load(path)


def test_bases_of_other_sizes_are_an_error(tmp_path):
    """Detects that the number of degrees would be guessed from sizes that do not fit."""
    name = "interaction_blocks.0.lin_feature2.lin1.weight"
    path, *_ = save(tmp_path, "comenet", **{name: np.zeros((24, 5))})
    with pytest.raises(WeightsError, match="12 functions of the frame and 5 of the torsion"):
        comenet.load(path)
