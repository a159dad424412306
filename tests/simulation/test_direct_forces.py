"""Tests for force fields that predict forces directly: evaluation, calculators, relaxation, dynamics, export."""

import json
import logging
import warnings

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from mlip_jax import MLIPCalculator, crystal_properties, neb
from mlip_jax.datasets.columns import Columns
from mlip_jax.defaults import md_defaults, stability_defaults
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.layers.readouts import with_heads
from mlip_jax.potential import evaluate, hessian_columns, is_conservative
from mlip_jax.simulation import user_warnings
from mlip_jax.simulation.calculators.conservation import NonConservativeWarning
from mlip_jax.simulation.calculators.ensemble import EnsembleCalculator
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.export import DESCRIPTION, export_stablehlo
from mlip_jax.simulation.relaxation.relax import Relaxer, relax
from mlip_jax.simulation.user_warnings import domain_in_log
from mlip_jax.structure import Structure
from mlip_jax.terms import WithTerms
from tests.simulation.analytic import PartOfTheGradient, Springs, springs

TRIANGLE = Atoms("H2Ar", [[0, 0, 0], [0, 0, 1.5], [0.9, 0.8, 0.3]])


def expected_forces(positions, length=1.2, stiffness=3.0):
    """Forces of springs between all atoms; the stiffness includes the energy scale, 1.5."""
    vectors = positions[None] - positions[:, None]
    distances = np.linalg.norm(vectors, axis=-1) + np.eye(len(positions))
    return (stiffness * (1 - length / distances)[:, :, None] * vectors).sum(1)


def expected_energy(positions, length=1.0, stiffness=3.0):
    distances = np.linalg.norm(positions[None] - positions[:, None], axis=-1)
    return 0.5 * stiffness * ((distances[np.triu_indices(len(positions), 1)] - length) ** 2).sum()


@pytest.fixture
def calculator():
    with pytest.warns(
        NonConservativeWarning, match="not the gradient of its energy .they are predicted directly"
    ):
        return MLIPCalculator(springs(), dtype="float64")


def test_a_warning_points_to_the_line_of_the_user():
    with pytest.warns(NonConservativeWarning) as warned:
        MLIPCalculator(springs(), dtype="float64")
    assert [w.filename for w in warned] == [__file__]
    with domain_in_log(), warnings.catch_warnings(record=True) as shown:
        user_warnings.warn("outside", user_warnings.OutsideDomainWarning)
        user_warnings.warn("other")
    assert [str(w.message) for w in shown] == ["other"]


def test_forces_are_the_predicted_ones_times_the_energy_scale(calculator, caplog):
    caplog.set_level(logging.INFO)
    atoms = TRIANGLE.copy()
    atoms.calc = calculator
    assert not calculator.conservative
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the warning is issued once
        np.testing.assert_allclose(atoms.get_forces(), expected_forces(atoms.positions), atol=1e-12)
        assert atoms.get_potential_energy() + 3 * 1234.5678 == pytest.approx(
            expected_energy(atoms.positions), abs=1e-9
        )
    # each compiled program is logged once
    (message,) = [m for m in caplog.messages if "compiling" in m]
    assert message.startswith("compiling energies and forces of up to ")


def test_hessian_and_stress_are_derivatives_of_the_energy(calculator):
    """Those of the direct forces would be derivatives of springs of another length."""
    hessian, step = calculator.get_hessian(TRIANGLE), 1e-5
    numeric = np.zeros((9, 9))
    for n, x in np.ndindex(3, 3):
        shift = np.zeros((3, 3))
        shift[n, x] = step
        plus, minus = (expected_forces(TRIANGLE.positions + s, length=1.0) for s in (shift, -shift))
        numeric[3 * n + x] = -(plus - minus).ravel() / (2 * step)
    np.testing.assert_allclose(hessian, numeric, atol=1e-8)
    crystal = Atoms("H", cell=[7, 7, 7.5], pbc=True)
    stress = calculator.get_property("stress", crystal)
    numeric = []
    for h in (step, -step):
        strained = crystal.copy()
        strained.set_cell(crystal.cell.array @ np.diag([1 + h, 1, 1]), scale_atoms=True)
        numeric.append(calculator.get_property("energy", strained))
    assert stress[0] == pytest.approx(
        (numeric[0] - numeric[1]) / (2 * step) / crystal.get_volume(), rel=1e-5
    )


class Confined(WithTerms):
    """Springs with the energy term x² / 2 of each atom (eV)."""

    def __call__(self, graph):
        outputs = self.model(graph)
        return outputs._replace(
            terms={"confinement": 0.5 * (graph.nodes["positions"] ** 2).sum(-1)}
        )


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("with_stress", [False, True])
def test_energy_terms_add_minus_their_gradient(with_stress):
    """Adding the gradient of the whole energy, or scaling the forces of terms, would be wrong."""
    positions = TRIANGLE.positions
    structure = Structure(TRIANGLE.numbers, positions, cell=np.eye(3) * 30, pbc=np.ones(3, bool))
    graph = build_batch(
        Columns.from_structures([structure]), PaddingBudget(5, 8, 2), 8.0, dtype=np.float64
    )
    out = jax.jit(lambda g: evaluate(Confined(Springs(), ()), {}, g, 1.5, with_stress))(graph)
    np.testing.assert_allclose(out.forces[:3], expected_forces(positions) - positions, atol=1e-12)
    assert out.energy[0] == pytest.approx(expected_energy(positions) + 0.5 * (positions**2).sum())
    assert (out.stress is not None) == with_stress


def test_wrappers_know_the_forces_of_their_model():
    for direct in (True, False):
        for model in (
            Springs(direct_forces=direct),
            WithTerms(Springs(direct_forces=direct), ()),
            with_heads(Springs(direct_forces=direct), {}),
        ):
            assert is_conservative(model) != direct


def test_without_derivatives_of_the_energy_there_is_no_stress_or_hessian():
    potential = springs()
    potential = type(potential)(**{**vars(potential), "model": PartOfTheGradient()})
    with pytest.warns(NonConservativeWarning, match="a part of the gradient"):
        calculator = MLIPCalculator(potential)
    crystal = Atoms("H", cell=[7, 7, 7], pbc=True)
    assert "stress" not in calculator.implemented_properties
    crystal.calc = calculator
    assert np.isfinite(crystal.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError):
        crystal.get_stress()
    with pytest.raises(PropertyNotImplementedError, match="has no Hessian"):
        calculator.get_hessian(TRIANGLE)
    graph = build_batch(
        Columns.from_structures([Structure(TRIANGLE.numbers, TRIANGLE.positions)]),
        PaddingBudget(5, 8, 2),
        8.0,
    )
    with pytest.raises(ValueError, match="has no stress"):
        evaluate(PartOfTheGradient(), {}, graph, 1.0, with_stress=True)
    with pytest.raises(ValueError, match="has no Hessian"):
        hessian_columns(PartOfTheGradient(), {}, graph, 1.0, np.zeros((1, 5, 3)))
    with pytest.raises(ValueError, match='no stress, which ensemble "npt" requires'):
        MolecularDynamics(crystal, potential, ensemble="npt", allow_nonconservative=True)


def test_ensemble_averages_direct_forces_with_gradients():
    with pytest.warns(NonConservativeWarning):
        calculator = EnsembleCalculator([springs(), springs(direct_forces=False)], dtype="float64")
    assert not calculator.conservative
    both = [expected_forces(TRIANGLE.positions, length) for length in (1.2, 1.0)]
    np.testing.assert_allclose(
        calculator.get_property("forces", TRIANGLE), np.mean(both, axis=0), atol=1e-12
    )
    np.testing.assert_allclose(
        calculator.get_property("forces_std", TRIANGLE), np.std(both, axis=0, ddof=1), atol=1e-12
    )


def test_relaxation_follows_direct_forces_until_they_vanish():
    """The energy rises on the way, which is no sign of divergence here."""
    start = Atoms("H2", [[0, 0, 0], [0, 0, 1.02]])
    (result,) = relax([start], springs(), fmax=1e-3, dtype="float64")
    assert result.converged and result.fmax < 1e-3
    assert result.atoms.get_distance(0, 1) == pytest.approx(1.2, abs=1e-3)
    assert result.energy > result.energy_start + 0.01


@pytest.mark.parametrize(
    "use",
    [
        lambda potential: Relaxer(potential),
        lambda potential: neb([[TRIANGLE, TRIANGLE[:2]]], potential),
        lambda potential: crystal_properties(TRIANGLE, potential),
    ],
    ids=["relaxation", "reaction paths", "crystals"],
)
def test_every_use_of_the_forces_warns_once(use):
    """Relaxations and reaction paths used to say nothing."""
    with pytest.warns(NonConservativeWarning, match="they are predicted directly") as warned:
        use(springs())
    assert len([w for w in warned if w.category is NonConservativeWarning]) == 1


def test_dynamics_need_consent():
    with pytest.raises(
        ValueError,
        match="not the gradient of its energy .they are predicted directly.*"
        "allow_nonconservative=True",
    ):
        MolecularDynamics(TRIANGLE, springs())
    dynamics = MolecularDynamics(
        TRIANGLE, springs(), allow_nonconservative=True, ensemble="nve", stop_on_bond_break=False
    )
    (trajectory,) = dynamics.run(2)
    assert np.isfinite(trajectory.thermo.temperature).all()


@pytest.mark.parametrize("defaults", [md_defaults, stability_defaults])
def test_consent_is_a_field_of_the_config(defaults):
    """The tasks pass it on by its name in Settings."""
    assert defaults()["allow_nonconservative"] is Settings().allow_nonconservative is False


def test_export_returns_direct_forces_and_says_so(tmp_path):
    export_stablehlo(springs(), tmp_path, max_atoms=3, dtype="float64", platforms=("cpu",))
    about = json.loads((tmp_path / DESCRIPTION).read_text())
    assert about["conservative"] is False
    with jax.enable_x64(True):
        program = jax.export.deserialize(
            bytearray((tmp_path / "force_field.stablehlo").read_bytes())
        )
        out = program.call(
            {
                "positions": np.pad(TRIANGLE.positions, ((0, 1), (0, 0))),
                "pairs": np.array([[0, 1], [0, 2], [1, 2]], np.int32),
                "numbers": np.array([1, 1, 18, 0], np.int32),
                "num_atoms": np.int32(3),
                "charge": np.zeros(()),
                "num_unpaired_electrons": np.zeros(()),
            }
        )
    np.testing.assert_allclose(out["forces"][:3], expected_forces(TRIANGLE.positions), atol=1e-12)
