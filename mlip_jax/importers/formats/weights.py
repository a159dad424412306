"""Readers for files that contain only arrays, and a check that weights fit a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from mlip_jax import models
from mlip_jax.files import NUMPY_ERRORS
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.foreign_files.texts import read_yaml as read_plain_yaml

HOW_TO_SAVE = (
    "Save the weights in the environment in which the model was trained: "
    '`safetensors.torch.save_file(model.state_dict(), "weights.safetensors")` or '
    '`numpy.savez("weights.npz", **{k: v.cpu().numpy() for k, v in '
    "model.state_dict().items()})`."
)


class WeightsError(ValueError):
    """Error for a file without readable weights, or for weights that do not fit the model."""


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of a .npz or .safetensors file by name.

    Parameters that share their memory are returned under each of their names.

    Raises:
      FileNotFoundError: No such file.
      WeightsError: The file has another format or is corrupted, or an array does not contain
        numbers. Files of PyTorch are read by state_files.py.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise WeightsError(
            f"{path}: weights must be in a .npz or .safetensors file, received "
            f"{path.suffix or 'no suffix'!r}. {HOW_TO_SAVE}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Give a file with weights, .npz or .safetensors."
        )
    return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
      FileNotFoundError: No such file.
      WeightsError: The file is not a plain mapping.
    """
    try:
        settings = read_plain_yaml(path)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path}: expected settings by name, received {type(settings).__name__}")
    return settings


def read_arguments(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Return arguments of a model, which may be the path of a YAML file."""
    return config if isinstance(config, Mapping) else read_yaml(config)


def check_arguments(
    config: Mapping[str, Any],
    required: Iterable[str],
    allowed: Mapping[str, Sequence[Any]],
    known: Iterable[str],
) -> None:
    """Raise ValueError if an argument of a model is missing or not supported.

    Args:
      config: Arguments of the constructor.
      required: Arguments that must be given.
      allowed: Supported values of arguments.
      known: All other arguments that may be given.
    """
    missing = [name for name in required if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the arguments of the model lack {', '.join(missing)}, which the weights do not show"
        )
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ValueError(
                f"argument {name} must be {' or '.join(map(repr, values))}, received {config[name]!r}"
            )
    unknown = sorted(set(config) - {*required, *allowed, *known})
    if unknown:
        raise ValueError(f"arguments {', '.join(unknown)} of the model are not supported")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        with open_npz(path) as data:
            for name in data.files:
                arrays[name] = _numbers(path, name, data)
    except NUMPY_ERRORS as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{path}: invalid or truncated .npz file: {error}. {HOW_TO_SAVE}"
        ) from error
    return arrays


def _numbers(path, name, data) -> np.ndarray:
    """Return an array of an .npz file; raise WeightsError if it does not contain real numbers."""
    try:
        array = data[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise WeightsError(
            f"{path}: array {name!r} contains Python objects, expected numbers; such arrays "
            f"are pickles and are not opened. {HOW_TO_SAVE}"
        ) from error
    if array.dtype.kind not in "biuf":
        raise WeightsError(f"{path}: array {name!r} has dtype {array.dtype}, expected real numbers")
    return array


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as data:
            arrays = {name: data.get_tensor(name) for name in data.keys()}
            # save_model stores a shared parameter once and lists its other names in the metadata
            others = data.metadata() or {}
    except (safetensors.SafetensorError, OSError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{path}: invalid .safetensors file, or unsupported by NumPy: {error}. {HOW_TO_SAVE}"
        ) from error
    return arrays | {
        name: arrays[kept] for name, kept in others.items() if kept in arrays and name not in arrays
    }


def check_shapes(model, params) -> None:
    """Raise WeightsError if the shapes of the parameters are not those of the model."""
    _, template = models.outline(model)
    expected = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    received = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    wrong = sorted(
        name
        for name in expected.keys() | received.keys()
        if expected.get(name) != received.get(name)
    )
    if wrong:
        name = wrong[0]
        raise WeightsError(
            f"{len(wrong)} parameters do not match the model described by the "
            f"hyperparameters; the first is {name}: shape {received.get(name)}, expected "
            f"{expected.get(name)}"
        )
