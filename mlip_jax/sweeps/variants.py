"""Variants of a config, loaded from sweep() of a config file and checked before any of them runs.

This module reads plain lists of dictionaries: ml_collections has no grids, and Hydra, Ray Tune and
Optuna bring their own config system, server or search.
"""

from __future__ import annotations

import graphlib
import importlib.util
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.sweeps.names import variant_names
from mlip_jax.sweeps.overrides import override, plain, to_text

SWEEP_FOLDER = "{sweep}"  # placeholder for the folder of the sweep in the value of a field
# ends at a comma: a value may list several folders
_VARIANT_FOLDER = re.compile(r"\{sweep\}/([A-Za-z0-9._+=-]+)")


class Variant(NamedTuple):
    """Variant of a config.

    Attributes:
      name: Name of the folder, unique within a sweep.
      overrides: {dotted name of a config field: value}.
      config: Config with the overrides applied.
      config_file: Config file that `config` comes from, or "" for the config file of the sweep.
    """

    name: str
    overrides: dict[str, Any]
    config: ml_collections.ConfigDict
    config_file: str = ""

    @property
    def needs(self) -> list[str]:
        """Names of the variants whose folders appear in the values of this variant."""
        return sorted(set(_VARIANT_FOLDER.findall(to_text(self.overrides))))


def product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the grid over values of config fields, where the last field varies fastest.

    >>> product({"seed": [0, 1], "train.batch_size": [8]})
    [{'seed': 0, 'train.batch_size': 8}, {'seed': 1, 'train.batch_size': 8}]

    Raises:
      ConfigError: The values of a field are not a sequence, or the sequence is empty.
    """
    for path, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(
                f"product: values of {path!r} must be a list with at least one value, received "
                f"{values!r}"
            )
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def load(config_file: str, config: ml_collections.ConfigDict) -> list[Variant]:
    """Return the checked variants that sweep() of a config file defines.

    Args:
      config_file: "FILE" or "FILE:ARGUMENT", as given to --config. sweep() receives the argument if
        it takes one.
      config: Config that the overrides are applied to.

    Raises:
      ConfigError: There is no sweep(), it does not return a list of dictionaries, two variants are
        the same or need each other, or a variant has an unknown field, model or option, or a value
        of the wrong type.
    """
    path, _, argument = config_file.partition(":")
    given = call_config_file(path, "sweep", argument)
    if (
        not isinstance(given, Sequence)
        or not given
        or not all(isinstance(v, Mapping) for v in given)
    ):
        raise ConfigError(
            f"{config_file}: sweep() must return a list of dictionaries, such as [{{'seed': 0}}, "
            f"{{'seed': 1}}], received {given!r}"
        )
    checked = []
    for number, variant in enumerate(given):
        try:
            overrides = plain({k: v for k, v in variant.items() if k not in ("name", "config")})
            other_file = variant.get("config", "")
            file, _, argument = other_file.partition(":")
            base = call_config_file(file, "get_config", argument) if other_file else config
            checked.append((overrides, _check(override(base, overrides)), other_file))
        except ValueError as error:
            raise ConfigError(
                f"{config_file}: variant {number} of the sweep, {dict(variant)!r}: {error}"
            ) from error
    names = variant_names(
        config_file, [v.get("name") for v in given], [overrides for overrides, _, _ in checked]
    )
    variants = [Variant(name, *rest) for name, rest in zip(names, checked)]
    _check_needs(config_file, variants)
    return variants


def _check_needs(config_file: str, variants: Sequence[Variant]) -> None:
    """Raise ConfigError if a variant needs an unknown variant or (also indirectly) itself."""
    needs = {v.name: v.needs for v in variants}
    for name, needed in needs.items():
        unknown = [other for other in needed if other not in needs]
        if unknown:
            raise ConfigError(
                f"{config_file}: {name} requires the folder of "
                + configs.unknown_name("variant", unknown[0], list(needs))
            )
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]
        raise ConfigError(
            f"{config_file}: {cycle[0]} requires its own folder, directly or indirectly: "
            + " <- ".join(cycle)
        ) from error


def load_report(config_file: str) -> Callable[[Path], Any] | None:
    """Return the function report(folder) of a config file, or None if it defines none."""
    return getattr(_load_module(config_file.partition(":")[0]), "report", None)


def _load_module(path: str):
    """Execute a config file and return it as a module."""
    path = configs.find_file(path)
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if spec is None or not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_config_file(path: str, name: str, argument: str) -> Any:
    """Call the function `name` of a config file.

    The function receives `argument` if it takes a parameter and `argument` is not empty.
    """
    function = getattr(_load_module(path), name, None)
    if not callable(function):
        raise ConfigError(
            f"{path}: no function {name}(). Add one that returns a list of variants, such as "
            "[{'seed': 0}, {'seed': 1}], or run it without --sweep."
        )
    return function(*[argument] if argument and inspect.signature(function).parameters else [])


def _check(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Check fields, model and training options, so that errors appear before the first run."""
    if config.get("task") == "property":
        configs.complete(config, defaults.property_defaults())
    task_defaults = {
        "train": defaults.train_defaults,
        "diversity": defaults.diversity_defaults,
    }.get(config.get("task"))
    if task_defaults is not None:
        from mlip_jax.potential import create_model
        from mlip_jax.training.options import check

        if config.model.name:  # otherwise the model of init.workdir, which may not exist yet
            create_model(config.model, config.get("potential"))
        check(configs.complete(config, task_defaults()))
    return config


def differing(
    variants: Sequence[Variant], config: ml_collections.ConfigDict
) -> list[dict[str, Any]]:
    """Return, per variant, the overrides that are not the same in all variants.

    `config` provides the value of a field that a variant does not override. Dictionaries, such as
    the options of a model, are skipped if the other values already distinguish the variants.
    """
    paths = dict.fromkeys(path for v in variants for path in v.overrides)
    columns = {
        path: [v.overrides.get(path, _value(config, path)) for v in variants] for path in paths
    }
    columns = {path: column for path, column in columns.items() if len(set(map(repr, column))) > 1}
    bare = {
        path: column
        for path, column in columns.items()
        if not any(isinstance(v, Mapping) for v in column)
    }
    others = list(map(repr, zip(*bare.values()))) if bare else [""] * len(variants)
    shown = {
        path: column
        for path, column in columns.items()
        if path in bare or len(set(zip(others, map(repr, column)))) > len(set(others))
    }
    return [{path: column[i] for path, column in shown.items()} for i in range(len(variants))]


def _value(config: ml_collections.ConfigDict, path: str) -> Any:
    """Return the value of a config field by its dotted name, None if it does not exist."""
    for part in path.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or part not in config:
            return None
        config = config[part]
    return plain(config)
