"""Agreement with the published program of PACE, on e3nn 0.6.0, and what is refused.

The fixtures are its outputs in float64 for small models with random weights: "radial" (Bessel
functions, order 3, degrees up to 2) and "expbern" (Bernstein polynomials, order 2).
"""

import jax
import numpy as np
import pytest

from mlip_jax.importers import pace
from mlip_jax.importers.formats.weights import WeightsError
from tests.importers import e3nn_fixtures as fixtures

pytestmark = pytest.mark.usefixtures("double_precision")
NAMES = ("radial", "expbern")


def imported(name, **changes):
    """The force field, and the fixture without the energy that is added once per structure."""
    fixture = fixtures.read(f"pace_{name}")
    config = fixture.config | {"average_energy": 0.0} | changes
    energies = fixture.energies - fixture.config["average_energy"]
    return pace.potential(fixture.state, config), fixture._replace(energies=energies)


@pytest.mark.parametrize("name", NAMES)
def test_energies_agree_with_pace(name):
    potential, fixture = imported(name)
    energies, _, _ = fixtures.results(potential, fixture, derivatives=False)
    np.testing.assert_allclose(energies, fixture.energies, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "undirected"), [("radial", True), ("expbern", True), ("expbern", False)]
)
def test_forces_agree_with_pace(name, undirected):
    potential, fixture = imported(name)
    found = fixtures.results(potential, fixture, undirected=undirected)
    fixtures.assert_agree(found, fixture, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_agrees_in_single_precision(name):
    potential, fixture = imported(name)
    with jax.enable_x64(False):
        found = fixtures.results(potential, fixture, np.float32)
    fixtures.assert_agree(found, fixture, 1e-5)


def test_options_are_read_from_weights_and_arguments():
    potential, _ = imported("radial")
    assert (potential.model.correlation, potential.model.feature_degree) == (3, 2)
    assert potential.energy_scale == 0.7 and potential.reference_energies[6] == -1.2
    assert not potential.model.old_signs and not potential.model.learned_scale
    assert imported("radial", e3nn="0.4.4")[0].model.old_signs


def test_scales_that_differ_between_elements_are_kept():
    fixture = fixtures.read("pace_expbern")
    scales = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    state = fixture.state | {"scale_shift.scale": scales}
    potential = pace.potential(state, fixture.config | {"average_energy": 0.0})
    assert potential.energy_scale == 1.0
    np.testing.assert_array_equal(potential.params["params"]["scale"], scales[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_energy": -2.5}, "average_energy=-2.5 is added to the energy of each structure"),
        ({"edge_emb": "bessel"}, "edge_emb must be"),
        ({"avg_num_neighbors": None}, "lack avg_num_neighbors"),
        ({"hidden_irreps": "8x0e+8x1e"}, "hidden_irreps must be"),
    ],
)
def test_unsupported_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        imported("expbern", **changes)


def test_unknown_weights_are_refused():
    fixture = fixtures.read("pace_expbern")
    state = fixture.state | {"node_attention.weight": np.ones(3)}
    with pytest.raises(WeightsError, match="node_attention"):
        pace.potential(state, fixture.config | {"average_energy": 0.0})
