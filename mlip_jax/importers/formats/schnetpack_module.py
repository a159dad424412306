"""Files of SchNetPack: best_inference_model, tasks and checkpoints, with the settings in them.

They contain the pickled model. Every class in it must be known here: an unknown one would change the
energies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlip_jax.importers.formats.torch_records import (
    Record,
    entries_of,
    is_module,
    kind_of,
    modules_of,
    state_dict,
)
from mlip_jax.importers.formats.weights import WeightsError

_CLASSES = frozenset(
    "NeuralNetworkPotential PaiNN PaiNNInteraction PaiNNMixing SchNet SchNetInteraction Dense "
    "GaussianRBF BesselRBF CosineCutoff MollifierCutoff PairwiseDistances Strain Atomwise Forces "
    "AddOffsets CastTo32 CastTo64 CastMap Embedding Sequential ModuleList Identity SiLU".split()
)
_ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "torch._C._nn.silu": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "schnetpack.nn.activations.shifted_softplus": "shifted_softplus",
    "torch.tanh": "tanh",
}


def find_model(content: Any) -> Record | None:
    """Return the pickled model in the content of a file, or None."""
    if isinstance(content, dict):
        content = entries_of(content.get("hyper_parameters")).get("model")
    if isinstance(content, Record) and content.name == "AtomisticTask":
        content = content.get("model")
    is_model = is_module(content) and kind_of(content).startswith("schnetpack.")
    return content if is_model else None


def read_model(content: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state dict of a model and arguments of `schnetpack.convert`.

    Raises:
      WeightsError: There is no model, or it has an unsupported part.
    """
    model = find_model(content)
    if model is None or model.name != "NeuralNetworkPotential":
        raise WeightsError(
            "expected a NeuralNetworkPotential of SchNetPack, received "
            f"{kind_of(model) or kind_of(content) or type(content).__name__}"
        )
    for prefix, module in modules_of(model):
        if module.name not in _CLASSES:
            raise WeightsError(f"{prefix[:-1]} is a {module.kind}, which is not supported")
    state = state_dict(model)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        trained = {
            name.removeprefix("model."): array
            for name, array in content["state_dict"].items()
            if isinstance(name, str) and name.startswith("model.") and isinstance(array, np.ndarray)
        }
        state |= {name: trained[name] for name in state.keys() & trained.keys()}
    energy = _energy_module(model)
    key = energy.get("output_key")
    options = {"energy_act": _activation(energy), "do_postprocessing": True}
    representation = model.get("representation")
    options |= _representation_options(representation)
    if not model.get("do_postprocessing"):
        options["do_postprocessing"] = False
    return _without_unused_offsets(state, model, key), options


def _energy_module(model: Record) -> Record:
    """Return the output module of the energy."""
    modules = [m for _, m in modules_of(model) if m.name == "Atomwise"]
    if len(modules) != 1:
        raise WeightsError(f"expected one Atomwise, that of the energy, received {len(modules)}")
    mode = modules[0].get("aggregation_mode")
    if mode != "sum":
        raise WeightsError(f"aggregation_mode of the energy must be 'sum', received {mode!r}")
    return modules[0]


def _representation_options(representation: Record) -> dict[str, Any]:
    """Return the activation of a representation, and the epsilon of a PaiNN."""
    blocks = [
        m
        for _, m in modules_of(representation)
        if m.name in ("PaiNNInteraction", "PaiNNMixing", "SchNetInteraction")
    ]
    options: dict[str, Any] = {"activation": _same([_activation(m) for m in blocks], "activation")}
    if representation.name == "PaiNN":
        mixing = [float(m.get("epsilon")) for m in blocks if m.name == "PaiNNMixing"]
        options["epsilon"] = _same(mixing, "epsilon")
    return options


def _activation(module: Record) -> str:
    """Return the activation of the layers in a module; the last one of each network has none."""
    kinds = [kind_of(m.get("activation")) for _, m in modules_of(module) if m.name == "Dense"]
    kinds = [kind for kind in kinds if kind and not kind.endswith(".Identity")]
    kind = _same(kinds, f"activations of {module.name}")
    if kind not in _ACTIVATIONS:
        raise WeightsError(
            f"{module.name}: the activation must be one of {', '.join(_ACTIVATIONS)}, received {kind}"
        )
    return _ACTIVATIONS[kind]


def _same(values: list, name: str) -> Any:
    if len(set(values)) != 1:
        raise WeightsError(f"{name} must be equal, received {values}")
    return values[0]


def _without_unused_offsets(state, model: Record, key) -> dict[str, np.ndarray]:
    """Return the state dict with zeros for offsets that are switched off."""
    state = dict(state)
    for prefix, module in modules_of(model):
        if module.name != "AddOffsets" or not prefix.startswith("postprocessors."):
            continue
        if module.get("_property") != key:
            raise WeightsError(f"{prefix[:-1]} changes {module.get('_property')!r}, not the energy")
        if not module.get("is_extensive"):
            raise WeightsError(f"{prefix[:-1]}: is_extensive must be True for the energy")
        for name, switch in (("mean", "add_mean"), ("atomref", "add_atomrefs")):
            if not module.get(switch) and f"{prefix}{name}" in state:
                state[f"{prefix}{name}"] = np.zeros_like(state[f"{prefix}{name}"])
    return state
