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

from mlip_jax.config import ConfigError, differences
from mlip_jax.datasets.statistics import ElementFit
from mlip_jax.importers import load_force_field
from mlip_jax.importers.parameters import describe
from mlip_jax.potential import Potential, create_model, example_graph
from mlip_jax.simulation.energies import energies
from mlip_jax.training.data import Split

log = logging.getLogger(__name__)

_FITTED = 2_000  # maximum number of structures in the fit of reference energies


def begin_from(config: ml_collections.ConfigDict) -> Potential | None:
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
            raise ConfigError(
                "model.name is empty and there is no init.workdir to take it from: set one of them"
            )
        return None
    found = load_force_field(config.init.workdir)
    theirs = describe(found.model)
    if not config.model.name:
        config.model.name = theirs["model"]["name"]
        config.model.options = ml_collections.ConfigDict(theirs["model"]["options"])
    model = create_model(config.model, config.potential)
    if model != found.model:
        raise ConfigError(
            f"{config.init.workdir} has another model than this config, which cannot begin from it:\n  "
            + "\n  ".join(differences(theirs, describe(model)))
            + "\n--config.model.name='' takes the architecture from there; energy terms are switched on "
            "in the part 'potential'."
        )
    return found


def parameters(begin: Potential) -> Any:
    """Return the parameters of `begin`, cast to the dtypes in which its model initializes them."""
    shapes = jax.eval_shape(begin.model.init, jax.random.key(0), example_graph())
    return jax.tree.map(lambda shape, leaf: np.asarray(leaf, shape.dtype), shapes, begin.params)


def reference_energies(
    begin: Potential, train: Split, elements: np.ndarray, seed: int
) -> np.ndarray:
    """Fit reference energies (eV), shape (119,), such that `begin` agrees with the training data.

    The fit uses at most 2,000 random structures; elements that none of them contains keep the
    reference energies of `begin`. The energies of these structures minus the predictions of `begin`
    are fitted by least squares, with one value per element, and the result is added to the
    reference energies of `begin`.

    Args:
      begin: Force field that training is initialized from.
      train: Training split.
      elements: Atomic numbers that occur in the training split.
      seed: Seed that selects the structures.

    Raises:
      ValueError: No structure in the fit has a known energy.
    """
    strange = sorted(set(elements.tolist()) - set(begin.elements))
    if strange:
        log.warning(
            "the force field that is begun from has not seen %s",
            ", ".join(chemical_symbols[z] for z in strange),
        )
    taken = train.sample(_FITTED, seed)
    columns = taken.columns(labels_only=True)
    # `begin` must accept the new elements; the fit corrects their energies
    everything = dataclasses.replace(
        begin, elements=tuple(sorted({*begin.elements, *elements.tolist()}))
    )
    fit = ElementFit()
    fit.add(columns, columns.energy - energies(everything, columns, np.arange(len(columns))))
    return begin.reference_energies + fit.solve()
