"""Hyperparameters of mlff v1.0, and the options of models and energy terms that they determine.

Units are those of the training, as given in hyperparameters.yaml; only eV and Å are supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.foreign_files.texts import read_yaml
from mlip_jax.importers.formats.weights import WeightsError


def read_hyperparameters(path: str | Path) -> dict[str, Any]:
    """Read a hyperparameters.yaml of mlff.

    Raises:
      WeightsError: The file is not valid YAML or has no entry "model".
    """
    try:
        settings = read_yaml(path)
    except ValueError as error:
        raise WeightsError(f"{path}: invalid YAML ({error})") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise WeightsError(f"{path}: expected hyperparameters of mlff with the entry 'model'")
    return settings


def model_settings(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of mlff's constructor, including `avg_num_neighbors`.

    Args:
      hyperparameters: The arguments themselves, or the content of a hyperparameters.yaml.

    Raises:
      WeightsError: Units other than eV and Å.
    """
    if "model" not in hyperparameters:
        return dict(hyperparameters)
    data = hyperparameters.get("data", {})
    if not isinstance(data, Mapping):
        raise WeightsError(f"hyperparameter data must be a table, received {data!r}")
    for name, unit in (("energy_unit", "eV"), ("length_unit", "Angstrom")):
        value = data.get(name, unit)
        if value != unit:
            raise WeightsError(
                f"hyperparameter data.{name} is {value!r}; only force fields in eV and "
                "Angstrom are supported"
            )
    settings = dict(hyperparameters["model"])
    average = data.get("avg_num_neighbors")
    return settings | ({} if average is None else {"avg_num_neighbors": average})


def model_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings of mlff to options of models/so3krates.py.

    Raises:
      WeightsError: A setting is missing or not supported.
    """
    settings = {k: v for k, v in settings.items() if k != "avg_num_neighbors" or v is not None}
    _check_supported(settings)
    renamed = {
        "num_features": "num_features",
        "num_layers": "num_layers",
        "num_heads": "num_heads",
        "radial_basis": "radial_basis_fn",
        "num_radial": "num_radial_basis_fn",
        "cutoff_fn": "cutoff_fn",
        "qk_activation": "qk_non_linearity",
        "message_normalization": "message_normalization",
        "layer_norm_1": "layer_normalization_1",
        "layer_norm_2": "layer_normalization_2",
        "residual_mlp_1": "residual_mlp_1",
        "residual_mlp_2": "residual_mlp_2",
        "energy_width": "energy_regression_dim",
    }
    missing = [name for name in (*renamed.values(), "degrees", "cutoff") if name not in settings]
    if missing:
        raise WeightsError(
            f"required hyperparameters of mlff's So3krates are missing: {', '.join(missing)}"
        )
    _check_values(settings)
    options = {ours: settings[theirs] for ours, theirs in renamed.items()}
    return options | {
        "degrees": tuple(settings["degrees"]),
        "cutoff": float(settings["cutoff"]),
        "avg_num_neighbors": float(settings.get("avg_num_neighbors", 1.0)),
        "energy_act": settings.get("energy_activation_fn", "identity"),
        "learned_scale": settings.get("energy_learn_atomic_type_scales", False),
        "learned_shift": settings.get("energy_learn_atomic_type_shifts", False),
        "charge_embedding": settings.get("use_charge_embed", False),
        "spin_embedding": settings.get("use_spin_embed", False),
    }


def _check_supported(settings) -> None:
    """Raise WeightsError if settings use an unsupported activation or energy head."""
    act, width = settings.get("activation_fn", "silu"), settings.get("energy_regression_dim")
    if act != "silu":
        raise WeightsError(
            f"hyperparameter activation_fn must be 'silu', received {act!r}; other activations of "
            "filters and residual MLPs are not supported"
        )
    if not isinstance(width, int):
        raise WeightsError(
            f"hyperparameter energy_regression_dim must be an integer, received {width!r}; an "
            "energy head without a hidden layer is not supported"
        )


def _check_values(settings) -> None:
    """Raise WeightsError if a setting has an invalid value."""

    def is_positive_integer(value):
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    checks = {
        "a positive integer": (
            is_positive_integer,
            (
                "num_features",
                "num_layers",
                "num_heads",
                "num_radial_basis_fn",
                "energy_regression_dim",
            ),
        ),
        "a list of positive integers": (
            lambda v: (
                isinstance(v, list | tuple)
                and len(v) > 0
                and all(is_positive_integer(l) for l in v)
            ),
            ("degrees",),
        ),
        "a positive number": (
            lambda v: isinstance(v, Real) and 0 < v < np.inf,
            (
                "cutoff",
                "avg_num_neighbors",
                "electrostatic_energy_scale",
                "dispersion_energy_scale",
            ),
        ),
        "a name": (
            lambda v: isinstance(v, str),
            (
                "radial_basis_fn",
                "cutoff_fn",
                "qk_non_linearity",
                "message_normalization",
                "energy_activation_fn",
            ),
        ),
    }
    for expected, (fits, names) in checks.items():
        for name in names:
            if name in settings and not fits(settings[name]):
                raise WeightsError(
                    f"hyperparameter {name} must be {expected}, received {settings[name]!r}"
                )
    if (
        settings["message_normalization"] == "avg_num_neighbors"
        and "avg_num_neighbors" not in settings
    ):
        raise WeightsError(
            "hyperparameter avg_num_neighbors (data.avg_num_neighbors in a "
            "hyperparameters.yaml) is missing; message_normalization 'avg_num_neighbors' "
            "requires it"
        )


def term_options(
    settings: Mapping[str, Any],
    long_range_cutoff: float | None = None,
    dispersion_switch_width: float = 2.0,
) -> dict[str, dict[str, Any]]:
    """Return {name: options} of the energy terms that the settings switch on."""
    width = settings.get("energy_regression_dim")
    act = settings.get("energy_activation_fn", "identity")
    terms: dict[str, dict[str, Any]] = {}
    if settings.get("zbl_repulsion_bool"):
        terms["zbl"] = {"cutoff": float(settings["cutoff"]), "cutoff_fn": settings["cutoff_fn"]}
    if settings.get("electrostatic_energy_bool"):
        terms["electrostatics"] = {
            "cutoff": long_range_cutoff,
            "damping": settings["electrostatic_energy_scale"],
            "width": width,
            "act": act,
        }
    if settings.get("dispersion_energy_bool"):
        terms["dispersion"] = {
            "cutoff": long_range_cutoff,
            "switch_width": dispersion_switch_width,
            "scale": settings["dispersion_energy_scale"],
            "width": width // 2,
            "act": act,
        }
    return terms
