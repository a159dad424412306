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
from mlip_jax.training.options import inherit_options

log = logging.getLogger(__name__)

_MAX_FIT_STRUCTURES = 2_000  # maximum number of structures in the fit of reference energies


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
    shapes = jax.eval_shape(initial.model.init, jax.random.key(0), example_graph())
    return jax.tree.map(lambda shape, leaf: np.asarray(leaf, shape.dtype), shapes, initial.params)


def reference_energies(
    initial: Potential, train: Split, elements: np.ndarray, seed: int
) -> np.ndarray:
    """Fit reference energies (eV), shape (119,), such that `initial` agrees with the training data.

    The fit uses at most 2,000 random structures; elements that none of them contains keep the
    reference energies of `initial`. The energies of these structures minus the predictions of
    `initial` are fitted by least squares, with one value per element, and the result is added to
    the reference energies of `initial`.

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
    sample = train.sample(_MAX_FIT_STRUCTURES, seed)
    columns = sample.columns(labels_only=True)
    # `initial` must accept the new elements; the fit corrects their energies
    extended = dataclasses.replace(
        initial, elements=tuple(sorted({*initial.elements, *elements.tolist()}))
    )
    fit = ElementFit()
    fit.add(columns, columns.energy - energies(extended, columns, np.arange(len(columns))))
    return initial.reference_energies + fit.solve()
