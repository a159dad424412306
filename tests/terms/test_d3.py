"""Tests for the D3 term against the package dftd3, for all elements, molecules and crystals."""

import dataclasses

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.units import Bohr, Hartree

from mlip_jax import MLIPCalculator, importers, terms
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.importers import load_force_field, split_force_fields
from mlip_jax.importers.catalog.added_terms import add_terms, split_term_options
from mlip_jax.potential import active_terms, evaluate, example_graph
from mlip_jax.simulation.force_fields import load_each
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.inputs import find_cell_obstacle
from mlip_jax.structure import from_ase
from mlip_jax.terms.layers.d3_functionals import FUNCTIONALS, parameters_of
from tests.simulation.analytic import pairwise
from tests.terms import d3_golden
from tests.terms.test_terms import Neighbors

pytestmark = pytest.mark.usefixtures("double_precision")

CUTOFFS = {
    "cutoff": d3_golden.CUTOFFS[0] * Bohr,
    "coordination_cutoff": d3_golden.CUTOFFS[1] * Bohr,
    "switch_width": 0.0,
}


def batch(model, structures, pairs):
    columns = Columns.from_structures(map(from_ase, structures))
    budget = PaddingBudget(len(columns.numbers) + 2, 1200, len(columns) + 1, pairs)
    return build_batch(
        columns, budget, 4.0, dtype=np.float64, long_range_cutoff=model.long_range_cutoff
    )


def test_energies_forces_and_stress_equal_those_of_dftd3():
    model = terms.with_terms(Neighbors(), {"d3": {"functional": d3_golden.FUNCTIONAL, **CUTOFFS}})
    params = jax.jit(model.init)(jax.random.key(0), example_graph(np.float64))
    assert set(params["params"]) == {"model"}
    structures, expected = d3_golden.structures(), np.load(d3_golden.FILE)
    graph = batch(model, structures, 4096)
    out = jax.jit(lambda p, g: evaluate(model, p, g, 1.0, True))(params, graph)
    atoms = sum(map(len, structures))
    scale = np.abs(expected["gradient"]).max() * Hartree / Bohr
    np.testing.assert_allclose(out.energy[:-1], expected["energy"] * Hartree, rtol=1e-7)
    np.testing.assert_allclose(
        out.forces[:atoms], -expected["gradient"] * Hartree / Bohr, rtol=1e-6, atol=1e-7 * scale
    )
    for stress, virial, crystal in zip(out.stress[-3:-1], expected["virial"], structures[-2:]):
        right = virial * Hartree / crystal.cell.volume
        np.testing.assert_allclose(stress, right, rtol=1e-6, atol=1e-7 * np.abs(right).max())
    assert not np.asarray(out.forces[atoms:]).any() and out.energy[-1] == 0


def test_functionals_by_their_names():
    assert parameters_of("PBE") == parameters_of("pbe-d3(bj)") == (1.0, 0.7875, 0.4289, 4.4407)
    assert parameters_of("ωB97M-D3BJ") == FUNCTIONALS["wb97m"]
    assert parameters_of("r2SCAN") == FUNCTIONALS["r2scan"]
    with pytest.raises(ValueError, match="Did you mean 'pbesol'"):
        parameters_of("pbesoll")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"functional": "pbf"}, "functional of D3"),
        ({"switch_width": -1.0}, "must not be negative"),
        ({"coordination_cutoff": 0.0}, "must be positive"),
        ({"parameters": (1.0, 2.0)}, r"are \(s6, s8, a1, a2\)"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            terms.with_terms(Neighbors(), {"d3": options}).init,
            jax.random.key(0),
            example_graph(np.float64),
        )


def test_elements_without_reference_systems():
    terms.check_elements(["d3"], [1, 94])
    with pytest.raises(ValueError, match="Am, only for elements 1 to 94"):
        terms.check_elements(["d3"], [6, 95])


def test_the_cutoff_of_a_config_is_not_that_of_d3():
    chosen = active_terms({"d3": True, "electrostatics": True, "long_range_cutoff": 9.0})
    assert chosen == {"d3": {}, "electrostatics": {"cutoff": 9.0}}
    assert terms.with_terms(Neighbors(), chosen).long_range_cutoff == pytest.approx(31.75, abs=0.01)


def test_dispersion_is_added_to_any_force_field():
    """The energy is that of the force field plus D3; the long list has no effect on the model."""
    plain = pairwise(depth=0.02, length=2.2, cutoff=5.0, elements=(1, 6, 8))
    corrected = load_force_field(plain, dispersion="pbe")
    assert corrected.long_range_cutoff == pytest.approx(60 * Bohr)
    assert corrected.digest() != plain.digest() and corrected.cutoff == plain.cutoff
    calculator = MLIPCalculator.load(plain, "float64", dispersion="pbe")
    assert calculator.potential.digest() == corrected.digest()
    graph = batch(corrected.model, [Atoms("CO2", [[0, 0, 0.1], [0, 0, 1.2], [0, 3.0, 0]])], 16)
    ours, bare = (jax.jit(f.model.apply)(f.params, graph) for f in (corrected, plain))
    np.testing.assert_allclose(ours.energies, bare.energies, atol=1e-12)
    assert list(ours.terms) == ["d3"] and ours.terms["d3"].sum() < -1e-3
    with pytest.raises(ValueError, match="already has the dispersion"):
        add_terms(corrected, {"dispersion": "pbe"})
    with pytest.raises(ValueError, match="functional of D3"):
        add_terms(plain, {"dispersion": "pbf"})
    with pytest.raises(ValueError, match="no Ewald sums"):
        add_terms(plain, {"k_vectors": 100})


def test_primitive_cells_can_be_relaxed_with_dispersion():
    """The cutoff of 32 Å needs more images than a cell that has collapsed with other cutoffs."""
    plain = pairwise(depth=0.02, length=2.2, cutoff=5.0, elements=(6, 26))
    corrected = add_terms(plain, {"dispersion": "pbe"})
    for atoms in (bulk("C"), bulk("Fe")):
        assert find_cell_obstacle(atoms, corrected, CellFilter()) == ""
    flat = Atoms("C", cell=[2.0, 2.0, 0.8], pbc=True)
    assert "too many" in find_cell_obstacle(flat, corrected, None)


@pytest.mark.parametrize(
    "level, twice",
    [("ωB97M-D3(BJ)/def2-TZVPPD", True), ("GFN2-xTB", True), ("ωB97X-D/6-31G*", True)]
    + [("PBE/def2-SVP", False), ("ωB97X/6-31G(d)", False), ("unknown", False), ("", False)],
)
def test_the_level_of_theory_includes_the_added_dispersion(level, twice, caplog):
    """Evaluations used to compare with data without dispersion as if the levels were the same."""
    plain = pairwise(depth=0.02, length=2.2, cutoff=5.0, elements=(1, 6, 8))
    plain = dataclasses.replace(
        plain,
        metadata={"statistics": {"level_of_theory": level, "charges": [0.0]} if level else {}},
    )
    found = add_terms(plain, {"dispersion": "pbe"}).metadata["statistics"]
    assert found.get("level_of_theory", "") == (f"{level} + D3(BJ)" if level else "")
    assert found.get("charges", [0.0]) == [0.0]
    assert ("counts it twice" in caplog.text) == twice
    assert plain.metadata["statistics"].get("level_of_theory", "") == level


def test_options_of_terms():
    given = {"head": "a", "dispersion": "pbe", "k_vectors": 12.0}
    assert split_term_options(given) == ({"head": "a"}, {"dispersion": "pbe", "k_vectors": 12.0})


def test_dispersion_of_ensembles(tmp_path, monkeypatch):
    """Without a word, "a,b#dispersion=pbe" used to add D3 to the second member only."""
    plain = pairwise(depth=0.02, length=2.2, cutoff=5.0, elements=(1, 6, 8))
    monkeypatch.setattr(importers, "_load", lambda *_: plain)
    assert split_force_fields("a, b#x=1##dispersion=pbe#k_vectors=9") == [
        "a#dispersion=pbe#k_vectors=9",
        "b#x=1#dispersion=pbe#k_vectors=9",
    ]
    (tmp_path / "c##d").mkdir()
    assert split_force_fields(str(tmp_path / "c##d")) == [str(tmp_path / "c##d")]
    potentials = load_each(split_force_fields("a,b##dispersion=pbe"))
    assert all(p.long_range_cutoff == pytest.approx(60 * Bohr) for p in potentials)
    with pytest.warns(UserWarning, match="b#dispersion=pbe has it.*write a,b##dispersion=pbe"):
        potentials = load_each(split_force_fields("a,b#dispersion=pbe"))
    assert [p.long_range_cutoff is None for p in potentials] == [True, False]
    with pytest.raises(ValueError, match="expected an option NAME=VALUE"):
        load_each(split_force_fields("a,b##"))
