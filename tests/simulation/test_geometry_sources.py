"""Tests for generated geometries that are kept on disk."""

import numpy as np
from ase.build import molecule

from mlip_jax.datasets.columns import Columns
from mlip_jax.simulation.geometry_sources import Geometries, Sources
from mlip_jax.structure import from_ase


def test_relaxed_geometries_of_ions_and_radicals_are_not_those_of_the_neutral_molecule(
    make_potential,
):
    """Detects relaxed geometries that are reused for another charge."""
    identities = []

    class Recording(Sources):
        def get(self, source, samples):
            return Geometries(Columns.from_structures([from_ase(atoms)]), samples, samples)

        def _load_or_make(self, identity, make, samples):
            identities.append(identity)

    atoms = molecule("H2O")
    sources = Recording(None, np.arange(1), None, lambda: make_potential("tiny"))
    for state in ({}, {"charge": 2}, {"num_unpaired_electrons": 2}):
        atoms.info = state
        sources._relax("labels", np.arange(1))
    assert len({str(identity) for identity in identities}) == 3
