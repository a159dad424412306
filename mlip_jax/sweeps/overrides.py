"""Overrides: values of config fields by dotted name, and their text form for a command line."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax.config import ConfigError
from mlip_jax.defaults import TASKS


def override(
    config: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """Return a copy of `config` with some fields changed.

    Args:
      config: Config to copy.
      overrides: {dotted name: value}. If the value is a dictionary, only the fields that it
        contains change, except for the options of a model or an energy term, which are replaced as
        a whole.

    Raises:
      ConfigError: A field does not exist (the message suggests the nearest name), or a value has
        the wrong type.
    """
    # a deep copy keeps references between fields and placeholders of required fields
    changed = configs.rename_fields(copy.deepcopy(config))
    changed.unlock()
    overrides = _with_current_names(config.get("task"), dict(_flatten(overrides)))
    overrides |= dict.fromkeys(configs.replaced_fields(changed, overrides))
    # parents before the fields that they contain
    for path in sorted(overrides, key=lambda p: p.count(".")):
        *parents, name = path.split(".")
        target = changed
        for depth, parent in enumerate(parents, 1):
            if parent not in target:
                target[parent] = ml_collections.ConfigDict()
            target = target[parent]
            if not isinstance(target, ml_collections.ConfigDict):
                where = ".".join(parents[:depth])
                raise ConfigError(
                    f"config field {where!r} contains no further fields, received {path!r}"
                )
        value = overrides[path]
        # `complete` checks the types below, with the name of the field in its message
        with changed.ignore_type():
            target[name] = ml_collections.ConfigDict(value) if isinstance(value, Mapping) else value
    configs.complete(changed, config)
    return changed


def _with_current_names(task: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat overrides with the current names of their fields, and log each former name.

    Raises:
      ConfigError: A field is set by both of its names.
    """
    names = TASKS[task].renamed() if task in TASKS else {}
    renamed = {}
    for path, value in overrides.items():
        if path in names:
            configs.warn_renamed(path, names[path])
            if names[path] in overrides:
                raise ConfigError(
                    f"overrides set {path!r} and {names[path]!r}, which are the same field; set "
                    f"only {names[path]!r}"
                )
        renamed[names.get(path, path)] = value
    return renamed


def _flatten(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value), descending into dictionaries except model and term options."""
    for key, value in overrides.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and path not in configs.FREE_FIELDS:
            yield from _flatten(value, f"{path}.")
        else:
            yield path, value


def plain(value: Any) -> Any:
    """Return `value` as plain dictionaries, lists, tuples, strings, numbers, booleans and None.

    Raises:
      ConfigError: `value` contains another type.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"invalid value {value!r} of type {type(value).__name__} for a config field; expected a "
        "number, string, boolean, None, or a list, tuple or dictionary of them"
    )


def to_text(overrides: Mapping[str, Any]) -> str:
    """Return overrides as the ASCII text of a Python dictionary, which `parse` reads."""
    return ascii(plain(overrides))


def parse(text: str) -> dict[str, Any]:
    """Parse overrides from the text of a Python dictionary of literals; inf and nan are allowed.

    >>> parse("{'model.options.degrees': (1, 2), 'potential.long_range_cutoff': inf}")
    {'model.options.degrees': (1, 2), 'potential.long_range_cutoff': inf}

    Raises:
      ConfigError: The text is not such a dictionary.
    """
    try:
        overrides = ast.literal_eval(_NumberNames().visit(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"invalid overrides {text!r} ({error}); expected a dictionary such as "
            "\"{'model.options.degrees': (1, 2), 'seed': 1}\""
        ) from error
    if not isinstance(overrides, dict) or not all(isinstance(k, str) for k in overrides):
        raise ConfigError(f"overrides must be a dictionary of config fields, received {text!r}")
    return overrides


class _NumberNames(ast.NodeTransformer):
    """Transformer that replaces inf and nan, which Python parses as names, with numbers."""

    def visit_Name(self, node):
        return (
            ast.Constant({"inf": math.inf, "nan": math.nan}[node.id])
            if node.id in ("inf", "nan")
            else node
        )
