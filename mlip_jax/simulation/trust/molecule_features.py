"""Molecular features of a trained force field for data.selection "embedding"."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mlip_jax.config import ConfigError
from mlip_jax.datasets.store.array_cache import load_or_compute
from mlip_jax.datasets.store.store import Store
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import mean_features
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)


def of(options: Any) -> Callable[[Store, np.ndarray], np.ndarray] | None:
    """Return the function that computes the features for `data_split.split_data`; None if not needed.

    Args:
      options: config.data.

    Raises:
      ConfigError: If data.selection_force_field is missing.
      CheckpointError: If it contains no readable force field.
    """
    if options.selection != "embedding" or not options.num_molecules:
        return None
    if not options.selection_force_field:
        raise ConfigError(
            "data.selection='embedding' requires the workdir of a trained force field: "
            "--config.data.selection_force_field=runs/spice"
        )
    potential = load_force_field(options.selection_force_field)

    def embed(store: Store, indices: np.ndarray) -> np.ndarray:
        try:
            return features(potential, store, indices)
        except ValueError as error:
            raise ValueError(f"data.selection_force_field: {error}") from error

    return embed


def features(potential: Potential, store: Store, indices: np.ndarray) -> np.ndarray:
    """Compute the mean invariant features of the atoms of each structure, (I, F) float32.

    They are computed once per force field and choice of structures, and cached in the store's
    folder features/.

    Args:
      potential: The force field.
      store: Structures.
      indices: Indices of the I structures in the store.

    Raises:
      ValueError: If there are elements that the force field was not trained on.
    """
    selection = hashlib.sha256(np.ascontiguousarray(indices, np.int64).tobytes()).hexdigest()[:12]

    def make() -> np.ndarray:
        log.info(
            "computing features of %s with force field %s",
            count_of(len(indices), "molecule"),
            potential.digest(),
        )
        return mean_features(potential, store, indices)

    return load_or_compute(
        store.path / "features" / f"{potential.digest()}-{store.digest()}-{selection}.npy",
        np.float32,
        len(indices),
        make,
        "features of molecules",
    )
