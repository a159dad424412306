"""PaiNN and SchNet of SchNetPack 2, from its own files or from saved weights.

`best_inference_model`, tasks and checkpoints contain the pickled model. They are read without PyTorch
and without running any code in them (formats/torch_file.py).

The state dict of a `NeuralNetworkPotential` (possibly under a prefix, such as "model." of a
Lightning task) determines the architecture, its widths, depth, basis and cutoff. Everything else is
an argument here, with SchNetPack's default, if the file has only a state dict. Weights without a
counterpart (electronic embeddings, several outputs, other representations) are an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase.data import atomic_numbers

from mlip_jax import models
from mlip_jax.importers.formats import state_files, torch_file
from mlip_jax.importers.formats.schnetpack_module import find_model, read_model
from mlip_jax.importers.formats.schnetpack_state import EMBEDDING, RemainingWeights, list_names
from mlip_jax.importers.formats.weights import WeightsError, read
from mlip_jax.models.layers.basic import activation as activation_function
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential

_INTERACTIONS = "representation.interactions"


class Converted(NamedTuple):
    """Result of converting a force field; energies are in the units of its training.

    Attributes:
      name: Name of the model, for `models.create(name, **options)`.
      options: Options of the model.
      params: Parameters of the model.
      offsets: Energy to add for each element; row z belongs to element z. There are rows for all
        elements that the embedding and the atomic references, if any, contain.
    """

    name: str
    options: dict[str, Any]
    params: dict[str, Any]
    offsets: np.ndarray


def accepts(content: Any) -> bool:
    """Return whether the content of a file of torch.save is a model of SchNetPack."""
    return find_model(content) is not None


def load(
    path: str | Path,
    *,
    activation: str | None = None,
    energy_act: str | None = None,
    epsilon: float | None = None,
    do_postprocessing: bool | None = None,
    energy_unit: float = 1.0,
    elements: Sequence[int | str] | None = None,
) -> Potential:
    """Load a force field from a file of SchNetPack, or from one with a state dict.

    Args:
      path: File with the pickled model (best_inference_model, .task, .ckpt), or .npz or .safetensors
        file, see importers/formats/weights.py.
      activation, energy_act, epsilon, do_postprocessing: See `convert`; None for the values of the
        pickled model, or for the defaults of `convert`.
      energy_unit: Energy unit that the model was trained in (eV), such as `ase.units.kcal /
        ase.units.mol`. Lengths are in Å.
      elements: Symbols or atomic numbers that the model was trained on; others are rejected later.
        None for all elements in its table, which in SchNetPack has 99 elements regardless of the
        data.

    Raises:
      FileNotFoundError, WeightsError: See `weights.read` and `convert`.
      ValueError: `elements` has an element without weights or with an energy that is not finite.
    """
    given = {
        "activation": activation,
        "energy_act": energy_act,
        "epsilon": epsilon,
        "do_postprocessing": do_postprocessing,
    }
    given = {name: value for name, value in given.items() if value is not None}
    is_state = Path(path).suffix in (".npz", ".safetensors")
    content = read(path) if is_state else torch_file.read(path)
    try:
        if find_model(content) is None:
            weights, options = content if is_state else state_files.find(content), {}
        else:
            weights, options = read_model(content)
        converted = convert(weights, **(options | given))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    known = _elements(path, elements, converted.offsets)
    reference = np.zeros(MAX_ATOMIC_NUMBER + 1)
    reference[list(known)] = converted.offsets[list(known)] * energy_unit
    model, cutoff = models.create(converted.name, **converted.options), converted.options["cutoff"]
    metadata = {
        "source": "SchNetPack",
        "file": Path(path).name,
        "config": {"model": {"name": converted.name, "options": converted.options}},
        "statistics": {
            "cutoff": cutoff,
            "reference_energies": reference.tolist(),
            "energy_scale": energy_unit,
            "elements": list(known),
        },
    }
    return Potential(model, converted.params, cutoff, reference, energy_unit, known, metadata)


def _elements(path, elements, offsets) -> tuple[int, ...]:
    """Return the atomic numbers of `elements` after checking them.

    If `elements` is None all elements with a row in `offsets` are returned.
    """
    if elements is None:
        known = tuple(range(1, len(offsets)))
    else:
        known = tuple(
            sorted({atomic_numbers.get(z, -1) if isinstance(z, str) else int(z) for z in elements})
        )
        if not known or not 1 <= known[0] <= known[-1] < len(offsets):
            raise ValueError(
                f"{path}: elements must be symbols or atomic numbers from 1 to "
                f"{len(offsets) - 1}, for which there are weights; received {list(elements)}"
            )
    bad = [z for z in known if not np.isfinite(offsets[z])]
    if bad:
        raise ValueError(
            f"{path}: the reference energies of elements {bad} are not finite. Give "
            "`elements`, those that the model was trained on, without them."
        )
    return known


def convert(
    weights: Mapping[str, np.ndarray],
    activation: str | None = None,
    energy_act: str = "silu",
    epsilon: float = 1e-8,
    do_postprocessing: bool = True,
) -> Converted:
    """Convert the state dict of a PaiNN or SchNet with one `Atomwise` output, the energy.

    Args:
      weights: State dict as arrays.
      activation: Activation of the representation (layers.ACTIVATIONS); None for silu in PaiNN and
        shifted_softplus in SchNet. PaiNN supports only silu here.
      energy_act: Activation of the output module, whose contributions are summed over the atoms
        (`aggregation_mode="sum"`).
      epsilon: Option of PaiNN; not used for SchNet.
      do_postprocessing: Whether to add the mean and the atomic references of the postprocessor
        `AddOffsets`, as in SchNetPack. It is assumed to act on the energy, with `is_extensive`.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
      ValueError: Unknown activation.
    """
    state = RemainingWeights(weights)
    embedding = state.take(EMBEDDING, None, None)
    rows, width = embedding.shape
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, width), embedding.dtype)
    table[:rows] = embedding[: len(table)]
    cutoff, options = _cutoff_and_basis(state)
    convert_blocks = {"painn": _painn, "schnet": _schnet}[_kind(state)]
    name, more, params = convert_blocks(state, width, cutoff, options, activation, epsilon)
    activation_function(energy_act)
    head, energy_width = _energy(state, width)
    offsets = _offsets(state, min(rows, len(table)), do_postprocessing)
    state.finish()
    options |= more | {
        "num_features": width,
        "energy_width": energy_width,
        "energy_act": energy_act,
        "learned_shift": False,
    }
    return Converted(
        name, options, {"params": {"embedding": table, **params, "energy": head}}, offsets
    )


def _kind(state: RemainingWeights) -> str:
    """Return the architecture: "painn" or "schnet"."""
    for kind, mark in (
        ("painn", "representation.filter_net.weight"),
        ("schnet", f"{_INTERACTIONS}.0.in2f.weight"),
    ):
        if mark in state:
            return kind
    raise WeightsError(
        f"neither PaiNN nor SchNet of SchNetPack; the weights are {list_names(state.left, 20)}"
    )


def _cutoff_and_basis(state: RemainingWeights) -> tuple[float, dict[str, Any]]:
    """Return the cutoff (Å) and the options of cutoff and basis.

    Constants of the basis are kept as they are stored.
    """
    cutoff = state.number("representation.cutoff_fn.cutoff")
    options: dict[str, Any] = {"cutoff": cutoff, "cutoff_fn": "cosine"}
    # MollifierCutoff; eps only avoids a division by zero
    if "representation.cutoff_fn.eps" in state:
        state.number("representation.cutoff_fn.eps")
        options["cutoff_fn"] = "exponential"
    basis = "representation.radial_basis"
    if f"{basis}.freqs" in state:
        constants = {"radial_centers": state.take(f"{basis}.freqs", None)}
        options["radial_basis"] = "bessel"
    else:
        centers = state.take(f"{basis}.offsets", None)
        constants = {
            "radial_centers": centers,
            "radial_widths": state.take(f"{basis}.widths", len(centers)),
        }
        options["radial_basis"] = "gaussian"
    options["num_radial"] = len(constants["radial_centers"])
    return cutoff, options | {
        name: tuple(values.astype(np.float64).tolist()) for name, values in constants.items()
    }


def _take_radial_dense(
    state: RemainingWeights, name: str, cutoff: float, options, num_out: int | None
) -> dict[str, np.ndarray]:
    """Remove the linear layer that is applied to the radial basis and return it."""
    layer = state.dense(name, options["num_radial"], num_out)
    if options["radial_basis"] == "bessel":  # SchNetPack omits the factor of DimeNet
        layer["kernel"] = layer["kernel"].astype(np.float64) / np.sqrt(2.0 / cutoff)
    return layer


def _painn(state, width, cutoff, options, activation, epsilon):
    """Return name, options and parameters of a PaiNN."""
    if activation not in (None, "silu"):
        raise ValueError(f"PaiNN's activation must be silu, received {activation!r}")
    num_layers = state.count(_INTERACTIONS)
    filters = _take_radial_dense(state, "representation.filter_net", cutoff, options, None)
    if filters["kernel"].shape[1] == 3 * width:  # shared by all interactions
        filters = {
            name: np.concatenate([array] * num_layers, axis=-1) for name, array in filters.items()
        }
    if filters["kernel"].shape[1] != 3 * width * num_layers:
        raise WeightsError(
            f"representation.filter_net.weight: expected {3 * width * num_layers} or, shared, "
            f"{3 * width} rows for {num_layers} interactions, received "
            f"{filters['kernel'].shape[1]}"
        )
    params: dict[str, Any] = {"filters": filters}
    for n in range(num_layers):
        message, mixing = (
            f"{_INTERACTIONS}.{n}.interatomic_context_net",
            f"representation.mixing.{n}",
        )
        params[f"message_{n}_layer_1"] = state.dense(f"{message}.0", width, width)
        params[f"message_{n}_layer_2"] = state.dense(f"{message}.1", width, 3 * width)
        params[f"update_{n}"] = {
            "mix": state.dense(f"{mixing}.mu_channel_mix", width, 2 * width, use_bias=False),
            "layer_1": state.dense(f"{mixing}.intraatomic_context_net.0", 2 * width, width),
            "layer_2": state.dense(f"{mixing}.intraatomic_context_net.1", width, 3 * width),
        }
    return "painn", {"num_layers": num_layers, "epsilon": epsilon}, params


def _schnet(state, width, cutoff, options, activation, epsilon):
    """Return name, options and parameters of a SchNet."""
    activation = activation or "shifted_softplus"
    activation_function(activation)
    num_layers, num_filters, params = state.count(_INTERACTIONS), None, {}
    for n in range(num_layers):
        block = f"{_INTERACTIONS}.{n}"
        first = _take_radial_dense(state, f"{block}.filter_network.0", cutoff, options, num_filters)
        num_filters = first["kernel"].shape[1]
        params[f"filter_{n}"] = {
            "layer_1": first,
            "layer_2": state.dense(f"{block}.filter_network.1", num_filters, num_filters),
        }
        params[f"in_{n}"] = state.dense(f"{block}.in2f", width, num_filters, use_bias=False)
        params[f"out_{n}"] = {
            "layer_1": state.dense(f"{block}.f2out.0", num_filters, width),
            "layer_2": state.dense(f"{block}.f2out.1", width, width),
        }
    return (
        "schnet",
        {"num_layers": num_layers, "num_filters": num_filters, "activation": activation},
        params,
    )


def _energy(state: RemainingWeights, width: int) -> tuple[dict[str, Any], int]:
    """Return the parameters of the energy head and its hidden width."""
    modules = state.numbers(r"output_modules\.(\d+)\.outnet\.")
    if len(modules) != 1:
        raise WeightsError(
            "expected one output module with weights, the Atomwise of the energy; received "
            f"{len(modules)}: "
            f"{list_names(name for name in state.left if name.startswith('output_modules.'))}. "
            "Exclude the others when saving, if the energy does not depend on them."
        )
    outnet = f"output_modules.{modules[0]}.outnet"
    if state.numbers(rf"{re.escape(outnet)}\.(\d+)\.") != [0, 1]:
        raise WeightsError(
            f"the output network of the energy must have two layers, {outnet}.0 and "
            f"{outnet}.1; received "
            f"{list_names(name for name in state.left if name.startswith(outnet))}"
        )
    hidden = state.dense(f"{outnet}.0", width, None)
    energy_width = hidden["kernel"].shape[1]
    return {"hidden": hidden, "final": state.dense(f"{outnet}.1", energy_width, 1)}, energy_width


def _offsets(state: RemainingWeights, rows: int, do_postprocessing: bool) -> np.ndarray:
    """Return the energies that the postprocessors add per element, shape (rows,) or shorter."""
    offsets = np.zeros(rows)
    for name in [name for name in state.left if name.startswith("postprocessors.")]:
        if not do_postprocessing:
            del state.left[name]
        elif name.endswith(".mean"):
            offsets = offsets + state.number(name)
        elif name.endswith(".atomref"):
            atomref = state.take(name).astype(np.float64)
            if atomref.shape[:1] != (atomref.size,):
                raise WeightsError(
                    f"weight {name!r}: expected one energy per element, received shape "
                    f"{atomref.shape}"
                )
            offsets = offsets[: len(atomref)] + atomref.reshape(-1)[: len(offsets)]
        elif name.endswith(".scale"):
            raise WeightsError(
                f"weight {name!r} belongs to a ScaleProperty, and the state dict does not "
                "record which property it scales. Exclude it when saving; if it scales the "
                "energy, multiply weight and bias of the last layer of the output module by "
                "it."
            )
    return offsets
