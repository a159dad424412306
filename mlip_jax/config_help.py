"""What `--config=FILE --help` prints: what the config does, and its fields with their values and meaning."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import shutil
import textwrap
from pathlib import Path
from types import ModuleType

import ml_collections

from mlip_jax import config_fields
from mlip_jax.config import ConfigError, find_file

_NAMES = 46  # columns of a field and its value, beside which there is room for what it means


def help_text(path: str, width: int | None = None) -> str:
    """The docstring of a config file, and its fields with their values.

    Args:
      path: "FILE" or "FILE:ARGUMENT".
      width: Columns; by default those of the terminal.

    Raises:
      FileNotFoundError: There is no such file.
      ConfigError: Its get_config does not take that argument.
    """
    width = max(width or shutil.get_terminal_size((120, 40)).columns, 80)
    file, colon, argument = find_file(path).partition(":")
    module = _load(file)
    parts = [inspect.cleandoc(module.__doc__ or f"{file} has no docstring.")]
    given = (argument,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*given)
    except TypeError as error:
        if not colon:  # get_config cannot do without
            return "\n\n".join([*parts, f"The fields are shown with the argument: --config={path}:ARGUMENT --help"])
        raise ConfigError(f"{path}: get_config: {error}") from error
    config = module.get_config(*given)
    parts.append("Fields, changed as --config.FIELD=VALUE; units are eV and Å unless others are named:")
    parts.append("\n".join(_lines(config, width)))
    options = _model_options(config, width)
    return "\n\n".join([*parts, *options])


def _load(file: str) -> ModuleType:
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no config file {file}")
    spec = importlib.util.spec_from_file_location("config_of_help", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lines(config: ml_collections.ConfigDict, width: int) -> list[str]:
    function = config_fields.tasks().get(config.get("task"))
    meanings = config_fields.comments(function) if function else {}
    values = dict(config_fields.fields(function())) if function else {}  # a file may leave some to its task
    values |= dict(config_fields.fields(config))
    lines, part = [], ""
    for name, value in sorted(values.items(), key=lambda field: "." in field[0]):
        if name == "task" or any(other.startswith(f"{name}.") for other in values):
            continue
        if "." in name and name.partition(".")[0] != part:
            lines.append("")
        part = name.partition(".")[0]
        lines += _line(name, value, meanings.get(name, ""), width)
    return lines


def _line(name: str, value: object, meaning: str, width: int) -> list[str]:
    shown = "unset" if value is None else repr(dict(value) if isinstance(value, ml_collections.ConfigDict) else value)
    left = f"  {name} = {shown}"
    beside = textwrap.wrap(meaning, width - _NAMES)
    if not beside:
        return [left]
    first = left if len(left) >= _NAMES else left.ljust(_NAMES) + beside.pop(0)
    return [first] + [" " * _NAMES + line for line in beside]


def _model_options(config: ml_collections.ConfigDict, width: int) -> list[str]:
    """The options of the model that the config names, with their defaults, and the docstring that describes them."""
    name = config.get("model", {}).get("name") if "model" in config else None
    if not name:
        return []
    from mlip_jax import models
    model = models.find(name)
    own = [f for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    shown = ", ".join(f"{f.name} = {f.default!r}" for f in own)
    return [f"Options of the model {name!r}, as --config.model.options.NAME=VALUE, and their defaults:",
            textwrap.fill(shown, width, initial_indent="  ", subsequent_indent="  "),
            textwrap.indent(inspect.getdoc(model) or "", "  ")]
