"""PaiNN of fairchem-core (checked against 1.10.0) and of Force2Geo, from saved weights.

The state dict determines the architecture, its widths and depth, and which of the two forms it is.
It does not contain the cutoff of fairchem's form. Force2Geo predicts the energy per atom, the mean
of atomic energies; here the energy is their sum, and forces are minus its gradient.

The published behavior is kept: messages do not vanish at the cutoff, so energies and forces jump
there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats.state_files import read
from mlip_jax.importers.formats.torch_weights import TorchWeights, element_numbers
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.basic import STEP
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential

_FAIRCHEM_HEAD, _FORCE2GEO_HEAD = "out_forces", "out_position"


def load(
    path: str | Path,
    *,
    cutoff: float | None = None,
    envelope_exponent: int = 5,
    direct_forces: bool | None = None,
    energy_unit: float = 1.0,
    elements: Sequence[int | str] | None = None,
) -> Potential:
    """Load a force field from a file with the state dict of a PaiNN.

    Args:
      path: .npz, .safetensors or .pt file, see importers/formats/state_files.py.
      cutoff: Cutoff radius (Å); required for fairchem's form, and stored in the weights of
        Force2Geo's.
      envelope_exponent: Exponent of the polynomial envelope of fairchem's form.
      direct_forces: Whether forces are those of the vector head, which is dropped otherwise. None:
        if fairchem's form has a head. Force2Geo trains its head to displacements, not to forces.
      energy_unit: Energy per unit of the network's energies (eV), for example the standard
        deviation by which the targets were divided. It multiplies direct forces, too.
      elements: Symbols or atomic numbers that the model was trained on; others are rejected later.
        None for all elements in its table.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read` and `convert`.
      ValueError: An argument is missing or invalid.
    """
    weights = read(path)
    try:
        options, params, rows = convert(weights, cutoff, envelope_exponent, direct_forces)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    model = models.create("painn_oc", **options)
    check_shapes(model, params)
    known = element_numbers(elements, rows, path)
    metadata = {
        "source": "PaiNN of the Open Catalyst Project",
        "file": Path(path).name,
        "config": {"model": {"name": "painn_oc", "options": options}},
        "statistics": {"cutoff": options["cutoff"], "elements": list(known)},
    }
    reference = np.zeros(MAX_ATOMIC_NUMBER + 1)
    return Potential(model, params, options["cutoff"], reference, energy_unit, known, metadata)


def convert(
    weights: Mapping[str, np.ndarray],
    cutoff: float | None = None,
    envelope_exponent: int = 5,
    direct_forces: bool | None = None,
) -> tuple[dict[str, Any], dict[str, Any], range]:
    """Convert a state dict; for arguments see `load`.

    Returns:
      Options and parameters of the model, and the atomic numbers that have weights.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
      ValueError: The cutoff is missing.
    """
    fairchem = any(name.endswith("atom_emb.embeddings.weight") for name in weights)
    marker = "atom_emb.embeddings.weight" if fairchem else "atom_emb.weight"
    state = TorchWeights(weights, marker, "PaiNN of fairchem or Force2Geo")
    rows = state.take(marker, None, None)
    width, first = rows.shape[1], 1 if fairchem else 0  # fairchem has no row for number 0
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, width), rows.dtype)
    table[first : first + len(rows)] = rows
    num_layers = state.count("message_layers")
    options: dict[str, Any] = {
        "num_features": width,
        "num_layers": num_layers,
        "cutoff_fn": STEP,
        "learned_shift": False,
    }
    if fairchem:
        options |= _fairchem_options(state, cutoff, envelope_exponent, num_layers)
    else:
        options |= _force2geo_options(state, cutoff)
    head = _FAIRCHEM_HEAD if fairchem else _FORCE2GEO_HEAD
    has_head = f"{head}.output_network.0.vec1_proj.weight" in state
    options["direct_forces"] = fairchem and has_head if direct_forces is None else direct_forces
    params = {"embedding": table, **_layers(state, num_layers, width)}
    params["energy"] = {"hidden": state.dense("out_energy.0"), "final": state.dense("out_energy.2")}
    if options["direct_forces"]:
        params["forces"] = _vector_head(
            state, f"{head}.output_network", -1.0 if not fairchem else 1
        )
    state.drop(rf"{re.escape(head)}\..*")
    state.check_all_taken()
    return options, {"params": params}, range(1, first + len(rows))


def _fairchem_options(state, cutoff, envelope_exponent, num_layers) -> dict[str, Any]:
    """Return the options of fairchem's form. Its Gaussians are on an even grid from 0 to 1."""
    if cutoff is None:
        raise ValueError(
            "the weights of fairchem's PaiNN do not contain the cutoff: give cutoff (Å)"
        )
    centers = state.take("radial_basis.rbf.offset", None)
    _check_centers(centers, 1.0)
    names = [f"upd_out_scalar_scale_{n}.scale_factor" for n in range(num_layers)]
    scales = [float(state.take(name)) if name in state else 0.0 for name in names]
    return {
        "cutoff": float(cutoff),
        "num_radial": len(centers),
        "envelope_exponent": envelope_exponent,
        # a scale that was never fitted is stored as 0 and has no effect
        "layer_scales": tuple(scale or 1.0 for scale in scales) if any(scales) else None,
    }


def _force2geo_options(state, cutoff) -> dict[str, Any]:
    """Return the options of Force2Geo's form. Its Gaussians are on a grid up to the cutoff."""
    centers = state.take("radial_basis.offset", None)
    stored = float(centers[-1])
    _check_centers(centers, stored)
    if cutoff is not None and not np.isclose(cutoff, stored, rtol=1e-6):
        raise ValueError(f"the weights have a cutoff of {stored:g} Å, received {cutoff:g}")
    return {
        "cutoff": stored,
        "num_radial": len(centers),
        "envelope_exponent": None,
        "activation": "silu",
        "unit_directions": False,
    }


def _check_centers(centers, last) -> None:
    """Raise WeightsError if the centers of the Gaussians are not on an even grid from 0."""
    if not np.allclose(centers, np.linspace(0.0, last, len(centers)), atol=1e-6 * last):
        raise WeightsError("the Gaussians are not on an even grid from 0 to the cutoff")


def _layers(state, num_layers, width) -> dict[str, Any]:
    """Return the parameters of the message and update blocks."""
    params: dict[str, Any] = {}
    filters = []
    for n in range(num_layers):
        message, update = f"message_layers.{n}", f"update_layers.{n}"
        params[f"norm_{n}"] = state.norm(f"{message}.x_layernorm")
        params[f"message_{n}_layer_1"] = state.dense(f"{message}.x_proj.0")
        params[f"message_{n}_layer_2"] = _reorder(state.dense(f"{message}.x_proj.2"), width)
        filters.append(_reorder(state.dense(f"{message}.rbf_proj"), width))
        params[f"update_{n}"] = {
            "mix": state.dense(f"{update}.vec_proj", use_bias=False),
            "gate_layer_1": state.dense(f"{update}.xvec_proj.0"),
            "gate_layer_2": state.dense(f"{update}.xvec_proj.2"),
        }
    params["filters"] = {
        name: np.concatenate([f[name] for f in filters], axis=-1) for name in ("kernel", "bias")
    }
    return params


def _reorder(layer, width) -> dict[str, np.ndarray]:
    """Reorder outputs: scalars, vectors, directions become scalars, directions, vectors.

    Directions multiply the displacements of pairs.
    """
    return {
        name: np.concatenate(
            [array[..., :width], array[..., 2 * width :], array[..., width : 2 * width]], axis=-1
        )
        for name, array in layer.items()
    }


def _vector_head(state, name, sign) -> dict[str, Any]:
    """Return the parameters of the head of vectors, multiplied by `sign`.

    Displacements are from the sender to the receiver in Force2Geo, so its vectors have the opposite
    sign of those here.
    """
    params = {}
    for n in (0, 1):
        params[f"norm_{n}"] = state.dense(f"{name}.{n}.vec1_proj", use_bias=False)
        params[f"vectors_{n}"] = state.dense(f"{name}.{n}.vec2_proj", use_bias=False)
        params[f"gate_{n}_layer_1"] = state.dense(f"{name}.{n}.update_net.0")
        params[f"gate_{n}_layer_2"] = state.dense(f"{name}.{n}.update_net.2")
    params["vectors_0"] = {"kernel": sign * params["vectors_0"]["kernel"]}
    return params
