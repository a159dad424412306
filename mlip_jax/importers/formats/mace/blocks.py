"""Parts of state dicts that MACE and PACE have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlip_jax.importers.formats.recorded import RecordedWeights
from mlip_jax.models.layers.tensor_products.irreps import Irreps, natural, parse


def number_of(weights: RecordedWeights, name: str) -> float:
    """Return an array of one number."""
    return float(weights(name, 1).reshape(()))


def uniform_irreps(config: Mapping[str, Any], width: int) -> Irreps:
    """Return the irreps between layers, "Cx0e+Cx1o+..." with as many channels as the scalars.

    Raises:
      ValueError: The irreps have another form.
    """
    hidden = parse(str(config["hidden_irreps"]))
    if hidden != tuple((width, irrep) for irrep in natural(len(hidden) - 1)):
        raise ValueError(
            f"hidden_irreps must be {width}x0e, {width}x0e+{width}x1o, ... with these weights, "
            f"received {config['hidden_irreps']}"
        )
    return hidden


def contraction_params(
    weights: RecordedWeights, name: str, irreps: Irreps, correlation: int
) -> dict[str, np.ndarray]:
    """Return the weights of a symmetric contraction, (elements, paths, channels) each."""
    params = {}
    for n, (_, irrep) in enumerate(irreps):
        for order in range(1, correlation + 1):
            below = correlation - 1 - order
            array = f"{name}{n}.weights_max" if below < 0 else f"{name}{n}.weights.{below}"
            params[f"weights_{irrep.degree}_{order}"] = weights(array)
    return params
