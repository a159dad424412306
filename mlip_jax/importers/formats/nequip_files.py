"""Checkpoints (.ckpt) and packages (.nequip.zip) of NequIP: state dict and arguments of the model.

A checkpoint of a training with averaged weights stores those as buffers of their own; they are the
ones that NequIP evaluates.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.files import NUMPY_ERRORS
from mlip_jax.foreign_files.texts import parse_yaml
from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats.torch_records import (
    entries_of,
    is_module,
    kind_of,
    modules_of,
    plain,
    state_dict,
)
from mlip_jax.importers.formats.weights import WeightsError

_PRESETS = "nequip.model.PresetNequIPGNNModel"
_BUILDERS = ("nequip.model.NequIPGNNModel", "nequip.model.FullNequIPGNNModel")
_PRESET_ARGUMENTS = {
    "S": {"num_layers": 2, "l_max": 1, "num_features": [128, 64]},
    "M": {"num_layers": 4, "l_max": 2, "num_features": [128, 64, 32]},
    "L": {"num_layers": 6, "l_max": 3, "num_features": [128, 64, 32, 32]},
    "XL": {"num_layers": 6, "l_max": 4, "num_features": [320, 96, 64, 32, 32]},
}  # of nequip 0.19
_PREFIX = re.compile(r"model\.\w+\.")
_EMA = "ema.ema_weight_"
# buffers, and the option that makes each of them a parameter
_BUFFERS = {
    "._rmax_recip": "",
    ".bessel_weights": "bessel_trainable",
    ".per_type_energy_scale_shift.scales": "per_type_energy_scales_trainable",
    ".per_type_energy_scale_shift.shifts": "per_type_energy_shifts_trainable",
}


def is_nequip(content: Any) -> bool:
    """Return whether the content of a file is a checkpoint or a package of NequIP."""
    if isinstance(content, dict):
        model = entries_of(content.get("hyper_parameters")).get("model")
        return str(entries_of(model).get("_target_", "")).startswith("nequip.")
    return is_module(content) and any(
        kind_of(module).endswith("nequip.nn.graph_model.GraphModel")
        for prefix, module in modules_of(content)
        if prefix.count(".") <= 1
    )


def read(path: Path, config: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state dict and the arguments of the model builder.

    Args:
      path: Checkpoint or package.
      config: Arguments of the model builder; None for those in the file.

    Raises:
      FileNotFoundError, WeightsError: See `torch_file.read`; or the file is not one of NequIP, has
        several models, or was built by another function than those of NequIP.
    """
    content = torch_file.read(path)
    if not is_nequip(content):
        raise WeightsError(f"{path}: not a checkpoint or package of NequIP")
    if isinstance(content, dict):
        stored = plain(content["hyper_parameters"]).get("model")
        config = _arguments(stored, path) if config is None else config
        state = _average(_weights(content["state_dict"]), config)
    else:
        config = _arguments(_config_of_package(path), path) if config is None else config
        arrays = _weights(state_dict(content))
        state = {f"model.{name}": array for name, array in arrays.items()}
    prefixes = {match[0] for name in state if (match := _PREFIX.match(name))}
    if len(prefixes) != 1:
        raise WeightsError(f"{path}: expected one model, received {sorted(prefixes)}")
    return state, config


def _weights(state: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Return the arrays that are not empty, without the masks of e3nn's outputs."""
    return {
        name: array
        for name, array in state.items()
        if isinstance(array, np.ndarray) and array.size and not name.endswith(".output_mask")
    }


def _average(arrays: dict[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of the models, with averaged weights if there are any.

    The averaged weights are numbered in the order of the parameters, which is that of the arrays.
    """
    model = {name: array for name, array in arrays.items() if name.startswith("model.")}
    count = sum(name.startswith(_EMA) for name in arrays)
    if not count:
        return model
    buffers = tuple(end for end, option in _BUFFERS.items() if not config.get(option))
    parameters = [name for name in model if not name.endswith(buffers)]
    if len(parameters) != count:
        raise WeightsError(
            f"the checkpoint has {count} averaged weights for {len(parameters)} parameters: "
            "convert it to a package with nequip-package"
        )
    for k, name in enumerate(parameters):
        averaged = arrays[f"{_EMA}{k}"]
        if averaged.shape != model[name].shape:
            raise WeightsError(f"averaged weight {k} has another shape than {name}")
        model[name] = averaged
    return model


def _config_of_package(path: Path) -> Any:
    """Return the settings of the model in the text file of a package."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/model/config.yaml")]
        if len(names) != 1:
            raise WeightsError(f"{path}: the package has no config.yaml")
        info = archive.getinfo(names[0])
        if info.file_size > 1 << 20:
            raise WeightsError(f"{path}: config.yaml has {info.file_size} bytes, not a config")
        try:
            config = parse_yaml(archive.read(info))
        except NUMPY_ERRORS as error:
            raise WeightsError(f"{path}: config.yaml is not plain YAML: {error!r}") from error
    module = config.get("training_module") if isinstance(config, dict) else None
    return module.get("model") if isinstance(module, dict) else None


def _arguments(config: Any, path: Path) -> dict[str, Any]:
    """Return the arguments of the model builder, with those of a preset."""
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: the file does not contain the arguments of the model")
    builder = config.get("_target_")
    if builder == _PRESETS:
        preset = _PRESET_ARGUMENTS.get(str(config.get("preset")).upper())
        if preset is None:
            raise WeightsError(f"{path}: unknown preset {config.get('preset')!r} of NequIP")
        given = {k: v for k, v in config.items() if k != "preset"}
        shared = {"parity": False, "type_embed_num_features": 32}
        config, builder = shared | preset | given, _BUILDERS[0]
    if builder not in _BUILDERS:
        raise WeightsError(
            f"{path}: built by {builder}; supported builders are {' and '.join(_BUILDERS)}. For "
            "a model that continues another file, give config, the arguments of that model"
        )
    unresolved = [k for k, v in config.items() if isinstance(v, str) and v.startswith("${")]
    if unresolved:
        raise WeightsError(f"{path}: arguments {', '.join(unresolved)} are references; give config")
    return config
