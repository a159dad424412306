"""Agreement with mace-torch 0.3.16, and what is refused.

The fixtures are outputs of mace-torch in float64 for small models with random weights:
"residual" (residual blocks, degrees up to 2, order 3), "scalar" (no residual in the first layer,
scalar features), "density" (three layers, density blocks, Agnesi distances, nuclear repulsion).
Gradients and rotations alone would not notice a wrong order of weights, a wrong normalization or a
wrong sign of a coupling: only these numbers do.
"""

import jax
import numpy as np
import pytest
import yaml

from mlip_jax.importers import mace
from mlip_jax.importers.formats.weights import WeightsError
from tests.importers import e3nn_fixtures as fixtures

pytestmark = pytest.mark.usefixtures("double_precision")
NAMES = ("residual", "scalar", "density")


def imported(name, **changes):
    fixture = fixtures.read(f"mace_{name}")
    return mace.potential(fixture.state, fixture.config | changes), fixture


@pytest.mark.parametrize("name", ["residual", pytest.param("scalar", marks=pytest.mark.slow)])
def test_energies_agree_with_mace_torch(name):
    potential, fixture = imported(name)
    energies, _, _ = fixtures.results(potential, fixture, derivatives=False)
    np.testing.assert_allclose(energies, fixture.energies, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "undirected"),
    [
        ("density", True),
        pytest.param("density", False, marks=pytest.mark.slow),
        pytest.param("residual", True, marks=pytest.mark.slow),
        pytest.param("residual", False, marks=pytest.mark.slow),
        pytest.param("scalar", True, marks=pytest.mark.slow),
    ],
)
def test_forces_and_stress_agree_with_mace_torch(name, undirected):
    potential, fixture = imported(name)
    fixtures.assert_agree(
        fixtures.results(potential, fixture, undirected=undirected), fixture, 1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_agrees_in_single_precision(name):
    potential, fixture = imported(name)
    with jax.enable_x64(False):
        found = fixtures.results(potential, fixture, np.float32)
    fixtures.assert_agree(found, fixture, 1e-5)


def test_options_are_read_from_weights_and_arguments():
    model, _ = imported("density")
    model = model.model
    assert (model.first_interaction, model.interaction) == ("agnostic_density", "residual_density")
    assert (model.num_layers, model.max_degree, model.feature_degree) == (3, 2, 1)
    assert model.distance_transform == "agnesi" and model.zbl
    potential, fixture = imported(
        "scalar", interaction_cls="<class 'mace.X.RealAgnosticResidualInteractionBlock'>"
    )
    assert (potential.model.first_interaction, potential.model.interaction) == (
        "agnostic",
        "residual",
    )
    assert potential.elements == (1, 6, 7, 8, 16) and potential.energy_scale == 1.3
    assert potential.reference_energies[8] == -4.5


def test_file_and_arguments_in_yaml(tmp_path):
    fixture = fixtures.read("mace_density")
    np.savez(tmp_path / "model.npz", **fixture.state)
    settings = {k: str(v) if isinstance(v, list) else v for k, v in fixture.config.items()}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings))
    potential = mace.load(tmp_path / "model.npz", tmp_path / "model.yaml", energy_unit=2.0)
    assert potential.energy_scale == 2.2
    assert potential.reference_energies[1] == pytest.approx(2 * (-1.5 - 0.2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"avg_num_neighbors": None}, "avg_num_neighbors"),
        ({"interaction_cls": None}, "lack interaction_cls"),
        ({"interaction_cls": "RealAgnosticAttResidualInteractionBlock"}, "interaction_cls must be"),
        ({"use_reduced_cg": True}, "use_reduced_cg must be False"),
        ({"gate": "tanh"}, "gate must be silu"),
        ({"hidden_irreps": "16x0e+8x1o"}, "hidden_irreps must be"),
        ({"max_ell": 2}, "numbers"),
    ],
)
def test_unsupported_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        imported("residual", **changes)


def test_unknown_weights_are_refused():
    fixture = fixtures.read("mace_density")
    state = fixture.state | {"pair_repulsion_fn.a_exp": np.array(0.23)}
    with pytest.raises(WeightsError, match="a_exp must be 0.3"):
        mace.potential(state, fixture.config)
    with pytest.raises(WeightsError, match="joint_embedding"):
        mace.potential(fixture.state | {"joint_embedding.weight": np.ones(3)}, fixture.config)
