"""Weights and hyperparameters of mlff v1.0: So3krates (sparse form) with the terms of SO3LR.

Units are those of the training, as given in hyperparameters.yaml; only eV and Å are supported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential
from mlip_jax.terms import with_terms

_MAX_DEPTH = 12  # maximum depth of nested dicts
_MAX_ENTRIES = 100_000  # maximum number of entries of all dicts; SO3LR has about 300


class Weights:
    """Weights by their names in mlff; it records which of them have been used.

    Args:
      tree: Nested dicts or flat names with "/", with or without "params" at the top; leaves are
        arrays.

    Raises:
      WeightsError: A leaf is not an array of floating-point numbers, or there are far more leaves
        than in any model.
    """

    def __init__(self, tree: Mapping[str, Any]):
        self._arrays = {name.removeprefix("params/"): value for name, value in _flat(tree)}
        self._taken: set[str] = set()

    def __call__(self, name: str) -> np.ndarray:
        """Return the array `name`.

        Raises:
          WeightsError: There is no such array.
        """
        if name not in self._arrays:
            raise WeightsError(
                f"the weights hold no {name!r}; the hyper-parameters do not belong to them, or they are "
                f"not of mlff v1.0. There are {', '.join(sorted(self._arrays)[:8])}, ..."
            )
        self._taken.add(name)
        return self._arrays[name]

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """Return the kernel of a dense layer, and its bias if there is one."""
        found = {"kernel": self(f"{name}/kernel")}
        return found | ({"bias": self(f"{name}/bias")} if f"{name}/bias" in self._arrays else {})

    def elements(self, name: str, *rest: int | None) -> np.ndarray:
        """Return a table by atomic number, padded with zeros to 119 rows.

        Args:
          name: Name of the table, which has at most 119 rows.
          *rest: Expected shape of a row; None accepts any width.
        """
        table, rows = self(name), MAX_ATOMIC_NUMBER + 1
        fits = table.ndim == 1 + len(rest) and all(
            want in (None, has) for want, has in zip(rest, table.shape[1:])
        )
        if not fits or len(table) > rows:
            shape = ", ".join("any" if n is None else str(n) for n in rest)
            raise WeightsError(
                f"weight {name} has shape {table.shape}, expected a table by atomic number, "
                f"(at most {rows}, {shape})"
            )
        return np.concatenate([table, np.zeros((rows - len(table), *table.shape[1:]), table.dtype)])

    def number(self, name: str) -> np.ndarray:
        """Return a weight that is a single number, shape (1,)."""
        value = self(name)
        if value.shape != (1,):
            raise WeightsError(f"weight {name} has shape {value.shape}, expected one number, (1,)")
        return value

    def ending(self, end: str) -> str:
        """Return the prefix, including "/", of the only name that ends with `end`."""
        found = [name for name in self._arrays if name.endswith(f"/{end}")]
        if len(found) != 1:
            raise WeightsError(
                f"expected one weight whose name ends with {end!r}, found {len(found)}: {found}"
            )
        return found[0].removesuffix(end)

    def check_all_taken(self) -> None:
        """Raise WeightsError if a weight was not used.

        Otherwise the model would silently differ from the trained one.
        """
        left = sorted(set(self._arrays) - self._taken)
        if left:
            raise WeightsError(
                f"{len(left)} weights have no place in the model that the hyper-parameters describe: "
                f"{', '.join(left[:8])}"
            )


def _flat(tree):
    """Yield (name, array) of all leaves.

    The same dict can appear in several others, and in itself, so every visit is counted.
    """
    waiting, visits = [("", 0, tree)], 0
    while waiting:
        prefix, depth, entries = waiting.pop()
        visits += len(entries)
        if visits > _MAX_ENTRIES:
            raise WeightsError(
                f"more than {_MAX_ENTRIES} weights, which no model of this kind has; the file is "
                "damaged or malicious"
            )
        for name, value in entries.items():
            where = f"{prefix}{safe_pickle.short_repr(name) if not isinstance(name, str) else name[:200]}"
            if isinstance(value, Mapping) and depth < _MAX_DEPTH:
                waiting.append((f"{where}/", depth + 1, value))
            elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
                yield where, np.asarray(value)
            else:
                raise WeightsError(
                    f"weight {where} must be an array of floating numbers, received "
                    f"{type(value).__name__}"
                )


def load(
    path: str | Path,
    hyperparameters: Mapping[str, Any] | str | Path,
    elements: Iterable[int],
    long_range_cutoff: float | None = None,
    dispersion_switch_width: float = 2.0,
    reference_energies: np.ndarray | None = None,
) -> Potential:
    """Load a force field from saved weights.

    Args:
      path: .npz or .safetensors file with names that contain "/", or mlff's own .pkl, a pickle of
        NumPy arrays. An unpickler that accepts nothing but arrays reads it.
      hyperparameters: Arguments of mlff's constructor, or the path of a hyperparameters.yaml.
      elements, long_range_cutoff, dispersion_switch_width, reference_energies: See `potential`.

    Raises:
      FileNotFoundError: No such file.
      ValueError: The file contains no weights, or they do not match the hyperparameters.
    """
    if not isinstance(hyperparameters, Mapping):
        hyperparameters = read_hyperparameters(hyperparameters)
    return potential(
        read(path),
        hyperparameters,
        elements,
        long_range_cutoff,
        dispersion_switch_width,
        reference_energies,
        {"source": "mlff", "file": Path(path).name},
    )


def read(path: str | Path) -> Mapping[str, Any]:
    """Read the weights of a file; for formats and errors see `load`."""
    path = Path(path)
    if path.suffix != ".pkl":
        return weight_files.read(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a pickle of mlff's parameters is expected")
    with path.open("rb") as file:
        tree = safe_pickle.load(file, allowed=safe_pickle.NUMPY, source=str(path))
    if not isinstance(tree, dict) or not isinstance(tree.get("params"), dict):
        raise WeightsError(
            f"{path}: expected a dict with the entry 'params', received {safe_pickle.short_repr(tree)}"
        )
    return tree["params"]


def read_hyperparameters(path: str | Path) -> dict[str, Any]:
    """Read a hyperparameters.yaml of mlff.

    Raises:
      WeightsError: The file is not valid YAML or has no entry "model".
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise WeightsError(f"{path}: expected hyper-parameters of mlff with the entry 'model'")
    return found


def potential(
    tree: Mapping[str, Any],
    hyperparameters: Mapping[str, Any],
    elements: Iterable[int],
    long_range_cutoff: float | None = None,
    dispersion_switch_width: float = 2.0,
    reference_energies: np.ndarray | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert weights of mlff to a force field.

    Args:
      tree: Weights, see `Weights`.
      hyperparameters: Arguments of mlff's constructor, or the whole content of its
        hyperparameters.yaml.
      elements: Atomic numbers that the force field was trained on.
      long_range_cutoff: Cutoff of long-range pairs (Å); None for all pairs, which requires open
        boundaries.
      dispersion_switch_width: Width of the interval before the cutoff in which dispersion goes to
        zero (Å).
      reference_energies: Reference energy of each element (eV), shape (119,); None for zeros. mlff
        subtracts the shifts of its hyperparameters before training.
      metadata: Metadata of the force field.

    Raises:
      WeightsError: Weights and hyperparameters do not match, or they use an unsupported feature.
    """
    weights, settings = Weights(tree), model_settings(hyperparameters)
    model = models.create("so3krates", **model_options(settings))
    terms = term_options(settings, long_range_cutoff, dispersion_switch_width)
    model = with_terms(model, terms)
    params = model_params(weights, settings)
    if terms:
        params = {"model": params} | {name: TERM_PARAMS[name](weights) for name in terms}
    weights.check_all_taken()
    params = {"params": params}
    check_shapes(model, params)
    if reference_energies is None:
        reference_energies = np.zeros(MAX_ATOMIC_NUMBER + 1)
    return Potential(
        model,
        params,
        float(model.cutoff),
        reference_energies,
        1.0,
        tuple(elements),
        dict(metadata or {}),
    )


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
        raise WeightsError(f"hyper-parameter data must be a table, received {data!r}")
    for name, unit in (("energy_unit", "eV"), ("length_unit", "Angstrom")):
        given = data.get(name, unit)
        if given != unit:
            raise WeightsError(
                f"hyper-parameter data.{name} is {given!r}; only force fields in eV and Angstrom are "
                "supported"
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
        raise WeightsError(f"the hyper-parameters of mlff's So3krates lack {', '.join(missing)}")
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
            f"hyper-parameter activation_fn must be 'silu', received {act!r}; filters and residual "
            "MLPs with another activation are not supported"
        )
    if not isinstance(width, int):
        raise WeightsError(
            f"hyper-parameter energy_regression_dim must be a number, received {width!r}; an energy "
            "head without a hidden layer is not supported"
        )


def _check_values(settings) -> None:
    """Raise WeightsError if a setting has an invalid value."""

    def whole(value):
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    checks = {
        "a positive whole number": (
            whole,
            (
                "num_features",
                "num_layers",
                "num_heads",
                "num_radial_basis_fn",
                "energy_regression_dim",
            ),
        ),
        "a list of positive whole numbers": (
            lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(whole(l) for l in v),
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
                    f"hyper-parameter {name} must be {expected}, received {settings[name]!r}"
                )
    if (
        settings["message_normalization"] == "avg_num_neighbors"
        and "avg_num_neighbors" not in settings
    ):
        raise WeightsError(
            "the hyper-parameters lack avg_num_neighbors (data.avg_num_neighbors in a "
            "hyperparameters.yaml), by which message_normalization 'avg_num_neighbors' divides"
        )


def model_params(weights: Weights, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert weights to parameters of models/so3krates.py."""
    params = {"embedding": weights.elements("feature_embeddings_0/Embed_0/embedding", None)}
    states = [name for name in ("charge", "spin") if settings.get(f"use_{name}_embed")]
    for n, name in enumerate(states, 1):
        params[f"{name}_embedding"] = _state_embedding(
            weights, f"feature_embeddings_{n}/ChargeSpinEmbedSparse_0"
        )
    for n in range(settings["num_layers"]):
        params |= _layer(weights, settings, n)
    head = {
        "hidden": weights.dense("observables_0/energy_dense_regression"),
        "final": weights.dense("observables_0/energy_dense_final"),
    }
    if settings.get("energy_learn_atomic_type_scales"):
        head["scale"] = weights.elements("observables_0/atomic_scales")
    if settings.get("energy_learn_atomic_type_shifts"):
        head["shift"] = weights.elements("observables_0/energy_offset")
    return params | {"energy": head}


def _state_embedding(weights, name):
    return {
        "queries": weights.elements(f"{name}/Embed_0/embedding", None),
        "keys": weights(f"{name}/Embed_1/embedding"),
        "values": weights(f"{name}/Embed_2/embedding"),
        "residual": {
            f"layer_{k}": weights.dense(f"{name}/Residual_0/layers_{k - 1}") for k in (1, 2)
        },
    }


def _layer(weights, settings, n):
    block, layer, radial = f"layers_{n}/attention_block", {}, {}
    for mark, branch in ((1, "features"), (2, "ev")):
        layer[f"q_{branch}"] = {"kernel": weights(f"{block}/Wq{mark}")}
        layer[f"k_{branch}"] = {"kernel": weights(f"{block}/Wk{mark}")}
        layer[f"spherical_{branch}"] = _two_layers(weights, f"{block}/spherical_filter{mark}_layer")
        radial[f"layer_{n}_radial_{branch}"] = _two_layers(
            weights, f"{block}/radial_filter{mark}_layer"
        )
    layer["v_features"] = {"kernel": weights(f"{block}/Wv1")}
    layer["exchange"] = weights.dense(f"layers_{n}/exchange_block/mlp_layer_2")
    for mark in (1, 2):
        if settings[f"layer_normalization_{mark}"]:
            name = f"layers_{n}/layer_normalization_{mark}"
            layer[f"layer_norm_{mark}"] = {
                part: weights(f"{name}/{part}") for part in ("scale", "bias")
            }
        if settings[f"residual_mlp_{mark}"]:
            layer[f"residual_mlp_{mark}"] = _two_layers(weights, f"layers_{n}/res_mlp_{mark}_layer")
    return radial | {f"layer_{n}": layer}


def _two_layers(weights, name):
    return {f"layer_{k}": weights.dense(f"{name}_{k}") for k in (1, 2)}


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


def zbl_params(weights: Weights) -> dict[str, np.ndarray]:
    """Convert weights to parameters of terms/zbl.py.

    Both programs store softplus⁻¹ of the values.
    """

    def stored(*names):
        return np.concatenate(
            [weights.number(f"observables_0/zbl_repulsion/{name}") for name in names]
        )

    return {
        "exponents": stored("a1", "a2", "a3", "a4"),
        "coefficients": stored("c1", "c2", "c3", "c4"),
        "power": stored("p")[0],
        "inverse_length": stored("d")[0],
    }


def electrostatics_params(weights: Weights) -> dict[str, Any]:
    """Convert weights to parameters of terms/electrostatics.py."""
    name = weights.ending("charge_dense_final_vec/kernel")
    return {
        "bias": weights.elements(f"{name}Embed_0/embedding", 1)[:, 0],
        "hidden": weights.dense(f"{name}charge_dense_regression_vec"),
        "final": weights.dense(f"{name}charge_dense_final_vec"),
    }


def dispersion_params(weights: Weights) -> dict[str, Any]:
    """Convert weights to parameters of terms/dispersion.py."""
    name = weights.ending("hirshfeld_ratios_dense_final/kernel")
    return {
        "shift": weights.elements(f"{name}Embed_0/embedding", 1)[:, 0],
        "queries": weights.elements(f"{name}Embed_1/embedding", None),
        "hidden": weights.dense(f"{name}hirshfeld_ratios_dense_regression"),
        "final": weights.dense(f"{name}hirshfeld_ratios_dense_final"),
    }


TERM_PARAMS = {
    "zbl": zbl_params,
    "electrostatics": electrostatics_params,
    "dispersion": dispersion_params,
}
