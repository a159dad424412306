"""Tests for batches and the combination of the members of an ensemble. No program is compiled."""

import dataclasses

import numpy as np
import pytest
from ase.build import molecule

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import GrowingBudget
from mlip_jax.simulation import batch_prediction
from mlip_jax.simulation.batch_prediction import BatchPredictor, ForceFieldMember, MemberArrays
from mlip_jax.simulation.device_memory import ProgramTooLarge
from mlip_jax.simulation.ensemble_mean import level_of_theory, mean_potential
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.simulation.trust.ensemble_calibration import Calibration, Scale
from mlip_jax.structure import from_ase

FEATURES = 2


def domain(border):
    points = np.zeros((9, FEATURES), np.float32)
    edges, errors = np.zeros(0), {"forces": np.ones(1)}
    return Domain(points, np.zeros(FEATURES), np.ones(FEATURES), border, edges, errors)


def combined(make_potential, domains, distances):
    """Return the predictions of two members for a water molecule and its cation."""
    ion = molecule("H2O")
    ion.info |= {"charge": 1, "num_unpaired_electrons": 1}
    columns = Columns.from_structures(map(from_ase, (molecule("H2O"), ion)))
    members = [
        ForceFieldMember(str(k), make_potential("tiny", k), d) for k, d in enumerate(domains)
    ]
    calibration = Calibration(
        tuple(m.potential.digest() for m in members), Scale(1.0, 1.0), Scale(1.0, 1.0), 1
    )
    predictor = BatchPredictor(members, calibration=calibration)
    arrays = [MemberArrays(m, columns, False) for m in members]
    for k, (a, distance) in enumerate(zip(arrays, distances)):
        a.energy[:], a.forces[:] = k, k
        if a.distance is not None:
            a.distance[:] = distance
    return predictor.combine(columns, np.zeros(2, bool), arrays)


def test_one_member_outside_its_domain_is_sufficient(make_potential):
    """Detects evaluations that use the mean over the members, unlike relaxations."""
    result = combined(make_potential, [domain(1.0), domain(2.0)], [0.5, 3.0])
    np.testing.assert_allclose(result.domain_distance, 1.5)
    assert result.outside_domain.tolist() == [True, True]
    result = combined(make_potential, [domain(1.0), None], [0.5, 3.0])
    np.testing.assert_allclose(result.domain_distance, 0.5)


def test_unseen_states_have_no_expected_error_also_without_a_domain(make_potential):
    """Detects charges that are flagged only with a domain, and finite expected errors of ensembles."""
    result = combined(make_potential, [None, None], [0, 0])
    assert result.outside_domain.tolist() == [False, True]
    assert np.isnan(result.energy_expected_error).tolist() == [False, True]
    assert np.isnan(result.forces_expected_error).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("levels", "expected"),
    [(("PBE", "PBE"), "PBE"), (("PBE", "HF"), "HF / PBE"), (("PBE", None), "PBE / unknown")],
)
def test_the_level_of_theory_of_an_ensemble_is_that_of_its_members(
    make_potential, levels, expected
):
    members = [
        dataclasses.replace(
            make_potential("tiny", k),
            metadata={"statistics": {} if level is None else {"level_of_theory": level}},
        )
        for k, level in enumerate(levels)
    ]
    assert level_of_theory(mean_potential(members)) == expected


@pytest.mark.parametrize(("available", "largest"), [(300, 300), (60, 60), (1, 16)])
def test_batches_are_chosen_for_the_memory_of_the_device(
    make_potential, monkeypatch, available, largest
):
    """The program needs one byte per padded atom; a single structure is tried in any case."""
    columns = Columns.from_structures([from_ase(molecule("H2O"))] * 64)
    predictor = BatchPredictor([ForceFieldMember("a", make_potential("tiny", 0), None)])
    compiled = []

    def check_fits(program, *args, device):
        compiled.append(len(args[-1].nodes["numbers"]))
        if compiled[-1] > available:
            raise ProgramTooLarge(compiled[-1], available)

    monkeypatch.setattr(batch_prediction, "check_fits", check_fits)
    sizes, growing = graph_sizes(columns, 5.0, None), GrowingBudget()
    arrays = [MemberArrays(predictor.members[0], columns, False)]
    for _ in range(2):  # the second call compiles nothing
        budget = predictor.fitting_budget(columns, sizes, 5.0, None, growing, [0], arrays)
    assert largest / 3 < budget.n_node <= largest
    assert len(compiled) <= (1 if available == 300 else 4)
