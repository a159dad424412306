"""ComENet of DIG, from saved weights.

The state dict determines the widths and the depth; it does not contain the cutoff. The outputs of
all atoms are summed, so a model that was trained on energies is a force field (`energy_unit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.importers.formats.directional import ConvertedNetwork, embedding_table, load_potential
from mlip_jax.importers.formats.torch_weights import TorchWeights
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.potential import Potential


def load(
    path: str | Path,
    *,
    cutoff: float = 8.0,
    energy_unit: float = 1.0,
    elements: Sequence[int | str] | None = None,
) -> Potential:
    """Load a force field from a file with the state dict of a ComENet.

    Args:
      path: File with the state dict, see importers/formats/state_files.py.
      cutoff: Cutoff radius of the training (Å); the default is that of DIG.
      energy_unit: Energy per unit of the network's output (eV).
      elements: Symbols or atomic numbers that the model was trained on; others are rejected later.
        None for all elements in its table.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read` and `convert`.
      ValueError: An element has no weights.
    """
    further = {"cutoff": float(cutoff)}
    return load_potential(path, "comenet", "ComENet", convert, further, energy_unit, elements)


def convert(weights: Mapping[str, np.ndarray]) -> ConvertedNetwork:
    """Convert a state dict.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
    """
    state = TorchWeights(weights, "emb.emb.weight", "ComENet of DIG")
    table, rows = embedding_table(state.take("emb.emb.weight", None, None))
    num_layers, num_dense = state.count("interaction_blocks"), state.count("lins")
    params: dict[str, Any] = {"embedding": table, "energy_final": state.dense("lin_out")}
    for k in range(num_dense):
        params[f"energy_layer_{k}"] = state.dense(f"lins.{k}")
    for n in range(num_layers):
        converted = _interaction(state, f"interaction_blocks.{n}", num_dense)
        params |= {f"{name}_{n}": value for name, value in converted.items()}
    state.check_all_taken()
    # L^2 K functions of the frame, and L K of the torsion
    of_frame, of_torsion = (
        len(params[f"{name}_basis_1_0"]["kernel"]) for name in ("frame", "torsion")
    )
    num_degrees = of_frame // of_torsion
    if num_degrees * of_torsion != of_frame or of_torsion % num_degrees:
        raise WeightsError(
            f"{of_frame} functions of the frame and {of_torsion} of the torsion are not those of "
            "one number of degrees and radial functions"
        )
    options = {
        "num_features": table.shape[1],
        "num_layers": num_layers,
        "num_radial": of_torsion // num_degrees,
        "max_degree": num_degrees - 1,
        "num_basis_features": params["frame_basis_1_0"]["kernel"].shape[1],
        "num_dense_layers": num_dense,
        "rounded_bessel": True,
        "learned_shift": False,
    }
    return ConvertedNetwork(options, {"params": params}, rows)


def _interaction(state: TorchWeights, block: str, num_dense: int) -> dict[str, Any]:
    """Return the parameters of an interaction block."""
    params: dict[str, Any] = {
        "in": state.dense(f"{block}.lin"),
        "join": state.dense(f"{block}.lin_cat"),
        "out": state.dense(f"{block}.final"),
        "norm": state.norm(f"{block}.norm")
        | {"mean_scale": state.take(f"{block}.norm.mean_scale", None)},
    }
    for name, theirs in (("frame", 1), ("torsion", 2)):
        params |= {
            f"{name}_basis_1": state.dense(f"{block}.lin_feature{theirs}.lin1", use_bias=False),
            f"{name}_basis_2": state.dense(f"{block}.lin_feature{theirs}.lin2", use_bias=False),
            f"{name}_neighbors": state.dense(f"{block}.conv{theirs}.lin_rel"),
            f"{name}_own": state.dense(f"{block}.conv{theirs}.lin_root", use_bias=False),
            f"{name}_out": state.dense(f"{block}.lin{theirs}"),
        }
    for k in range(num_dense):
        params[f"layer_{k}"] = state.dense(f"{block}.lins.{k}")
    return params
