"""Molecules in the space of what a trained force field learned of them, by which data.selection "embedding" chooses."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mlip_jax.config import ConfigError
from mlip_jax.datasets.store.array_cache import array_beside
from mlip_jax.datasets.store.store import Store
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import mean_features

log = logging.getLogger(__name__)


def of(options: Any) -> Callable[[Store, np.ndarray], np.ndarray] | None:
    """What source.split asks for features, for config.data; None where its selection needs none.

    Raises:
      ConfigError: data.selection_force_field is missing. CheckpointError: Nothing readable is there.
    """
    if options.selection != "embedding" or not options.num_molecules:
        return None
    if not options.selection_force_field:
        raise ConfigError("data.selection='embedding' needs the workdir of a trained force field: "
                          "--config.data.selection_force_field=runs/spice")
    potential = Potential.load(options.selection_force_field)

    def embed(store: Store, indices: np.ndarray) -> np.ndarray:
        try:
            return features(potential, store, indices)
        except ValueError as error:
            raise ValueError(f"data.selection_force_field: {error}") from error

    return embed


def features(potential: Potential, store: Store, indices: np.ndarray) -> np.ndarray:
    """Means over the atoms of their invariant features, of the structures `indices`, (I, F) float32.

    They are computed once for each force field and choice of structures, and kept in the store's folder features/.

    Raises:
      ValueError: There are elements that the force field was not trained on.
    """
    chosen = hashlib.sha256(np.ascontiguousarray(indices, np.int64).tobytes()).hexdigest()[:12]

    def make() -> np.ndarray:
        log.info("features of %d molecules by the force field %s", len(indices), potential.digest())
        return mean_features(potential, store, indices)

    return array_beside(store.path / "features" / f"{potential.digest()}-{store.digest()}-{chosen}.npy", np.float32,
                        len(indices), make, "features of molecules")
