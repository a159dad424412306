"""What a force field begins from when it is not at random: another one, which it fine-tunes on its own data.

Parameters and the scale of the energies are the other's. Reference energies are made anew, so that data of another
method, or of another zero of energy, begin where the other force field leaves off: the least squares are of what it
leaves of the energies, by element.
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

_FITTED = 2_000  # structures that tell the reference energies


def begin_from(config: ml_collections.ConfigDict) -> Potential | None:
    """The force field of config.init.workdir; None where that is empty.

    The part "model" of `config` becomes its own where model.name is empty.

    Raises:
      CheckpointError, ValueError, FileNotFoundError: There is no force field that can be read.
      ConfigError: `config` has another model or other energy terms; or no model, and nothing to take it from.
    """
    if not config.init.workdir:
        if not config.model.name:
            raise ConfigError("model.name is empty and there is no init.workdir to take it from: set one of them")
        return None
    found = load_force_field(config.init.workdir)
    theirs = describe(found.model)
    if not config.model.name:
        config.model.name = theirs["model"]["name"]
        config.model.options = ml_collections.ConfigDict(theirs["model"]["options"])
    model = create_model(config.model, config.potential)
    if model != found.model:
        raise ConfigError(f"{config.init.workdir} has another model than this config, which cannot begin from it:\n  "
                          + "\n  ".join(differences(theirs, describe(model)))
                          + "\n--config.model.name='' takes the architecture from there; energy terms are switched on "
                          "in the part 'potential'.")
    return found


def parameters(begin: Potential) -> Any:
    """Those of `begin`, in the precision that its model is initialised in."""
    shapes = jax.eval_shape(begin.model.init, jax.random.key(0), example_graph())
    return jax.tree.map(lambda shape, leaf: np.asarray(leaf, shape.dtype), shapes, begin.params)


def reference_energies(begin: Potential, train: Split, elements: np.ndarray, seed: int) -> np.ndarray:
    """Reference energies (119,) in eV with which `begin` fits the training data best, by least squares.

    Those of some thousand structures: what its own reference energies and its model leave is fitted by element.

    Args:
      train: The training part. elements: Atomic numbers that occur there. seed: Of the structures that are taken.

    Raises:
      ValueError: No energy is known in the training set.
    """
    strange = sorted(set(elements.tolist()) - set(begin.elements))
    if strange:
        log.warning("the force field that is begun from has not seen %s", ", ".join(chemical_symbols[z]
                                                                                   for z in strange))
    taken = train.sample(_FITTED, seed)
    columns = taken.columns(labels_only=True)
    everything = dataclasses.replace(begin, elements=tuple(sorted({*begin.elements, *elements.tolist()})))
    fit = ElementFit()
    fit.add(columns, columns.energy - energies(everything, columns, np.arange(len(columns))))
    return begin.reference_energies + fit.solve()
