"""Tests for generated geometries that are kept on disk."""

import numpy as np
from ase.build import molecule

from mlip_jax.datasets.columns import Columns
from mlip_jax.simulation import geometry_sources
from mlip_jax.simulation.geometry_sources import Sources
from mlip_jax.simulation.relaxation.relax import Relaxation
from mlip_jax.structure import from_ase


def test_relaxed_geometries_of_ions_and_radicals_are_not_those_of_the_neutral_molecule(
    make_potential, monkeypatch, tmp_path
):
    """Detects relaxed geometries that are reused for another charge."""
    relaxed = []

    class Relaxer:
        def __init__(self, *args, **options):
            pass

        def stream(self, molecules):
            for k, atoms in molecules:
                relaxed.append(atoms.info)
                yield k, Relaxation(atoms, "converged")

    monkeypatch.setattr(geometry_sources, "Relaxer", Relaxer)
    atoms, states = molecule("H2O"), ({}, {"charge": 2}, {"num_unpaired_electrons": 2})
    for state in (*states, *states):  # the second time from the cache
        atoms.info = state
        columns = Columns.from_structures([from_ase(atoms)])
        sources = Sources(columns, np.arange(1), tmp_path, lambda: make_potential("tiny"))
        geometries = sources.get("relaxed(labels)", np.arange(1))
        structure = geometries.rows[geometries.index[0]]
        assert (structure.charge, structure.spin) == (
            state.get("charge", 0),
            state.get("num_unpaired_electrons", 0),
        )
    expected = [{"charge": 0, "num_unpaired_electrons": 0} | state for state in states]
    assert relaxed == expected
