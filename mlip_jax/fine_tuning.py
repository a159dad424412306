"""Fine-tuning: initialize training from another force field.

The parameters and the energy scale are copied. Reference energies are refitted: the energies that
the other force field leaves unexplained are fitted by least squares, with one value per element. So
data of another reference method, or with another zero of energy, do not change where training
starts.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import ml_collections
import numpy as np
from ase.data import chemical_symbols

from mlip_jax import models
from mlip_jax.config import ConfigError, differences
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.statistics import ElementFit
from mlip_jax.importers import load_force_field
from mlip_jax.importers.parameters import describe
from mlip_jax.potential import Potential, create_model
from mlip_jax.simulation.energies import energies
from mlip_jax.training.data import Split
from mlip_jax.training.options import inherit_options

log = logging.getLogger(__name__)

# Random structures in the fit of reference energies, and further ones of each rare element.
_MAX_FIT_STRUCTURES, _PER_RARE_ELEMENT = 2_000, 20
_CHUNK = 4096  # structures that are searched for rare elements at a time


def load_initial_force_field(config: ml_collections.ConfigDict) -> Potential | None:
    """Load the force field of config.init.workdir, or return None if that field is empty.

    If model.name is empty, the part "model" of `config` is filled in from the force field, in
    place.

    Raises:
      CheckpointError, ValueError, FileNotFoundError: There is no readable force field.
      ConfigError: `config` has a different model or different energy terms, or it has neither a
        model nor an init.workdir to take it from.
    """
    if not config.init.workdir:
        if not config.model.name:
            raise ConfigError("model.name and init.workdir are both empty. Set one of them.")
        return None
    initial = load_force_field(config.init.workdir)
    initial_model = describe(initial.model)
    if not config.model.name:
        config.model.name = initial_model["model"]["name"]
        config.model.options = ml_collections.ConfigDict(initial_model["model"]["options"])
    elif config.model.name == initial_model["model"]["name"]:
        inherit_options(config, initial_model["model"]["options"])
    model = create_model(config.model, config.potential)
    if model != initial.model:
        raise ConfigError(
            f"{config.init.workdir}: its model differs from that of this config, so training "
            "cannot start from it:\n  "
            + "\n  ".join(differences(initial_model, describe(model)))
            + "\nSet --config.model.name='' to use its architecture. Energy terms are set in the "
            "part 'potential'."
        )
    return initial


def parameters(initial: Potential) -> Any:
    """Return the parameters of `initial`, cast to the dtypes of its model's initial parameters."""
    _, shapes = models.outline(initial.model)
    return jax.tree.map(lambda shape, leaf: np.asarray(leaf, shape.dtype), shapes, initial.params)


def reference_energies(
    initial: Potential, train: Split, elements: np.ndarray, seed: int
) -> np.ndarray:
    """Fit reference energies (eV), shape (119,), such that `initial` agrees with the training data.

    The fit uses 2,000 random structures, and up to 20 structures of each element that these do not
    contain. The energies of these structures minus the predictions of `initial` are fitted by least
    squares, with one value per element, and the result is added to the reference energies of
    `initial`.

    Args:
      initial: Force field that training is initialized from.
      train: Training split.
      elements: Atomic numbers that occur in the training split.
      seed: Seed that selects the structures.

    Raises:
      ValueError: No structure in the fit has a known energy.
    """
    unknown = sorted(set(elements.tolist()) - set(initial.elements))
    if unknown:
        log.warning(
            "the initial force field was not trained on %s",
            ", ".join(chemical_symbols[z] for z in unknown),
        )
    columns = fit_sample(train, elements, seed)
    # `initial` must accept the new elements; the fit corrects their energies
    extended = dataclasses.replace(
        initial, elements=tuple(sorted({*initial.elements, *elements.tolist()}))
    )
    fit = ElementFit()
    fit.add(columns, columns.energy - energies(extended, columns, np.arange(len(columns))))
    return initial.reference_energies + fit.solve()


def fit_sample(train: Split, elements: np.ndarray, seed: int) -> Columns:
    """Return random structures with known energies that together contain all elements."""
    columns = train.sample(_MAX_FIT_STRUCTURES, seed).columns(labels_only=True)
    labelled = np.isfinite(columns.energy)
    found = columns.take(np.flatnonzero(labelled)).numbers if labelled.any() else ()
    missing = dict.fromkeys(set(elements.tolist()) - set(np.unique(found).tolist()), 0)
    further = []
    if missing and len(train) > _MAX_FIT_STRUCTURES:
        for start in range(0, len(train), _CHUNK):
            indices = train.indices[start : start + _CHUNK]
            chunk, rows = train.rows.take(indices, labels_only=True), []
            owner = np.repeat(np.arange(len(chunk)), chunk.n_atoms)
            for s in np.unique(owner[np.isin(chunk.numbers, list(missing))]).tolist():
                atoms = chunk.numbers[chunk.offsets[s] : chunk.offsets[s + 1]]
                rare = [z for z in missing if missing[z] < _PER_RARE_ELEMENT and z in atoms]
                if rare and np.isfinite(chunk.energy[s]):
                    rows.append(s)
                    missing |= {z: missing[z] + 1 for z in rare}
            further += [chunk.take(np.array(rows))] if rows else []
    return Columns.concatenate([columns, *further])
