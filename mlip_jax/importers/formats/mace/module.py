"""Pickled models of mace-torch (.model): state dict and arguments of the constructor.

Every class in the file must be known here: an unknown one would change the energies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlip_jax.importers.formats.torch_records import (
    Record,
    attributes_of,
    kind_of,
    modules_of,
    plain,
    state_dict,
)
from mlip_jax.importers.formats.weights import WeightsError

MODELS = ("MACE", "ScaleShiftMACE")
_BLOCKS = frozenset(
    "RealAgnosticInteractionBlock RealAgnosticResidualInteractionBlock "
    "RealAgnosticDensityInteractionBlock RealAgnosticDensityResidualInteractionBlock "
    "LinearNodeEmbeddingBlock RadialEmbeddingBlock BesselBasis AgnesiTransform PolynomialCutoff "
    "ZBLBasis AtomicEnergiesBlock EquivariantProductBasisBlock SymmetricContraction Contraction "
    "LinearReadoutBlock NonLinearReadoutBlock ScaleShiftBlock reshape_irreps "
    # of e3nn and torch
    "Linear TensorProduct FullyConnectedTensorProduct SphericalHarmonics FullyConnectedNet _Layer "
    "normalize2mom Activation ModuleList ParameterList reduce_graph_module GraphModule "
    "RecursiveScriptModule".split()
)
_FIXED = {
    "apply_cutoff": (True, None),
    "use_so3": (False, None),
    "edge_irreps": (None,),
    "lammps_mliap": (False, None),
}
_SILU = ("torch.nn.functional.silu", "torch._C._nn.silu")


def is_mace(content: Any) -> bool:
    """Return whether the content of a file is a pickled model of mace-torch."""
    return kind_of(content).startswith("mace.")


def read_module(model: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state dict and the arguments of a pickled model.

    Raises:
      WeightsError: The model is not one of energies, or has an unsupported block or option.
    """
    if not isinstance(model, Record) or model.name not in MODELS:
        raise WeightsError(
            f"a model of class {kind_of(model) or type(model).__name__}; supported classes of "
            f"mace-torch are {' and '.join(MODELS)}"
        )
    _check_classes(model)
    attributes = attributes_of(model)
    for name, allowed in _FIXED.items():
        if (value := plain(attributes.get(name))) not in allowed:
            raise WeightsError(f"option {name} must be {allowed[0]}, received {value!r}")
    blocks = _children(model.get("interactions"))
    if not blocks:
        raise WeightsError("the model has no interaction blocks")
    config = {
        "interaction_cls_first": blocks[0].name,
        "interaction_cls": _same(
            [block.name for block in blocks[1:] or blocks], "interaction blocks"
        ),
        "hidden_irreps": _irreps(blocks[0].get("hidden_irreps")),
        "max_ell": _max_ell(blocks[0].get("edge_attrs_irreps")),
        "avg_num_neighbors": _same(
            [float(np.asarray(block.get("avg_num_neighbors"))) for block in blocks],
            "avg_num_neighbors of the layers",
        ),
        "heads": [str(head) for head in plain(attributes.get("heads")) or ["Default"]],
        "use_agnostic_product": bool(attributes.get("use_agnostic_product")),
        "use_last_readout_only": bool(attributes.get("use_last_readout_only")),
    }
    for block in blocks:
        if plain(block.get("edge_irreps")) not in (None, plain(block.get("node_feats_irreps"))):
            raise WeightsError("edge_irreps of a layer must equal its node_feats_irreps")
        for name in ("cueq_config", "oeq_config"):
            if block.get(name) is not None:
                raise WeightsError(
                    f"the layers use {name}: convert the model with mace_cueq_to_e3nn first"
                )
    state = {name: array for name, array in state_dict(model).items() if array.size}
    if model.name == "MACE":
        state |= {"scale_shift.scale": np.ones(()), "scale_shift.shift": np.zeros(())}
    return state, config


def _check_classes(model: Record) -> None:
    """Raise WeightsError if there is an unknown class, or another activation than silu."""
    for prefix, module in modules_of(model):
        if prefix and module.name not in _BLOCKS:
            raise WeightsError(f"{prefix[:-1]} is a {module.kind}, which is not supported")
        if module.name == "normalize2mom" and kind_of(module.get("f")) not in _SILU:
            raise WeightsError(
                f"{prefix[:-1]}: the activation must be silu, received {kind_of(module.get('f'))}"
            )
        if module.name == "SphericalHarmonics" and not (
            module.get("normalize") and module.get("normalization") == "component"
        ):
            raise WeightsError("spherical harmonics must be normalized by component")


def _children(modules: Any) -> list[Record]:
    """Return the modules of a ModuleList."""
    children = modules.get("_modules", {}) if isinstance(modules, Record) else {}
    return [child for child in children.values() if isinstance(child, Record)]


def _same(values: list, name: str) -> Any:
    if len(set(values)) != 1:
        raise WeightsError(f"{name} must be equal, received {values}")
    return values[0]


def _pairs(irreps: Any) -> list[tuple[int, int, int]]:
    """Return (channels, degree, parity) of irreps of e3nn."""
    try:
        return [(int(count), int(l), int(p)) for count, (l, p) in plain(irreps)]
    except (TypeError, ValueError) as error:
        raise WeightsError(f"cannot read irreps: {plain(irreps)!r}") from error


def _irreps(irreps: Any) -> str:
    if isinstance(irreps, str):  # of models of one layer
        return irreps
    return "+".join(f"{count}x{l}{'e' if p > 0 else 'o'}" for count, l, p in _pairs(irreps))


def _max_ell(irreps: Any) -> int:
    pairs = _pairs(irreps)
    if pairs != [(1, l, (-1) ** l) for l in range(len(pairs))]:
        raise WeightsError(f"spherical harmonics must be 1x0e+1x1o+..., received {_irreps(irreps)}")
    return len(pairs) - 1


def select_head(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any], head: str | None
) -> dict[str, np.ndarray]:
    """Return the state dict of a model with one head.

    Args:
      state: State dict.
      config: Arguments of the constructor; without "heads" the model has one.
      head: Name of the head; None if there is only one.

    Raises:
      ValueError: There is no such head, or several and none was given.
    """
    state, heads = dict(state), list(config.get("heads") or ["Default"])
    if (head is None and len(heads) > 1) or (head is not None and head not in heads):
        raise ValueError(
            f"head must be one of {', '.join(map(repr, heads))} for this model, received {head!r}. "
            f"State it as in X.model#head={heads[0]}"
        )
    h, num = heads.index(head) if head else 0, len(heads)
    layers = int(np.asarray(state.get("num_interactions", 0)))
    if config.get("use_last_readout_only"):
        if layers < 2:
            raise WeightsError("a model of one layer with use_last_readout_only has no readout")
        state = _add_readouts(state, layers)
    if config.get("use_agnostic_product"):
        state = _repeat_products(state)
    if num > 1:
        for name in (
            "atomic_energies_fn.atomic_energies",
            "scale_shift.scale",
            "scale_shift.shift",
        ):
            values = np.asarray(state[name])
            per_head = values.ndim == 2 if "energies" in name else values.size > 1
            state[name] = values[h] if per_head else values
        for n in range(layers):
            state |= _readout_of_head(state, f"readouts.{n}.", h, num)
    return state


def _readout_of_head(state, name, h, num) -> dict[str, np.ndarray]:
    """Return the weights of one head; e3nn divides the last ones by the root of all inputs."""
    if f"{name}linear.weight" in state:
        return {f"{name}linear.weight": state[f"{name}linear.weight"].reshape(-1, num)[:, h]}
    last = state[f"{name}linear_2.weight"].reshape(-1, num)
    width = len(last) // num
    first = state[f"{name}linear_1.weight"].reshape(-1, len(last))
    part = slice(h * width, (h + 1) * width)
    return {
        f"{name}linear_1.weight": first[:, part].reshape(-1),
        f"{name}linear_2.weight": last[part, h] / np.sqrt(num, dtype=last.dtype),
    }


def _add_readouts(state, layers) -> dict[str, np.ndarray]:
    """Return the state dict with readouts of zeros in all layers except the last."""
    moved = {k.replace("readouts.0.", f"readouts.{layers - 1}."): v for k, v in state.items()}
    hidden = moved[f"readouts.{layers - 1}.linear_1.weight"].size
    width = hidden // moved[f"readouts.{layers - 1}.linear_2.weight"].size
    return moved | {f"readouts.{n}.linear.weight": np.zeros(width) for n in range(layers - 1)}


def _repeat_products(state) -> dict[str, np.ndarray]:
    """Return the state dict with product weights for each element instead of common ones."""
    num = np.asarray(state["atomic_numbers"]).size
    return {
        k: np.repeat(v, num, axis=0) if ".contractions." in k and v.ndim == 3 and len(v) == 1
        and ".weights" in k else v
        for k, v in state.items()
    }  # fmt: skip
