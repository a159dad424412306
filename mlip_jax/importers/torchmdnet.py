"""TorchMD-Net's equivariant transformer (checked against 3.1.0): state dict and hyperparameters.

A state dict is incomplete: heads, cutoffs, activations and priors are among the hyperparameters
that torchmd-train writes to hparams.yaml. Lengths are in Å. The unit of energies is not stored.

The published behavior is kept: the energy of a model that was trained without `vector_cutoff`
(TorchMD-Net's default) jumps when a pair comes within the cutoff, as it does in TorchMD-Net
(models/equivariant_transformer.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mlip_jax import models
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.equivariant_transformer import filter_names, value_names
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "ssp": "shifted_softplus_float32",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "mish": "mish",
}
_SUPPORTED = {
    "model": ("equivariant-transformer",),
    "output_model": ("Scalar",),
    "reduce_op": ("add", "sum"),
    "atom_filter": (-1,),
    "box_vecs": (None,),
}
_REQUIRED = ("num_heads", "cutoff_lower", "cutoff_upper", "activation", "attn_activation")
_MODEL, _HEAD = "representation_model.", "output_model.output_network."


def load(
    path: str | Path,
    hparams: Mapping[str, Any] | str | Path | None = None,
    elements: Sequence[int | str] | None = None,
    energy_unit: float = 1.0,
) -> Potential:
    """Load a force field from saved weights.

    Args:
      path: .npz or .safetensors file with the state dict of the model.
      hparams: Arguments of TorchMD-Net's create_model, or the path of a YAML file with them; None
        for hparams.yaml in the folder of the weights.
      elements: Symbols or atomic numbers that the model was trained on; None for the elements with
        a nonzero reference energy, which requires the prior "Atomref".
      energy_unit: Energy per unit of the network's energies (eV), for example ase.units.Hartree or
        ase.units.kcal / ase.units.mol.

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of an equivariant transformer for energies, or they do
        not match the hyperparameters.
    """
    path = Path(path)
    if hparams is None:
        hparams = path.with_name("hparams.yaml")
        if not hparams.is_file():
            raise ValueError(
                f"{path}: the weights alone do not say {', '.join(_REQUIRED)}; give hparams, a dict or "
                f"the hparams.yaml of the training run (none is beside the file)"
            )
    settings = hparams if isinstance(hparams, Mapping) else read_hparams(hparams)
    return potential(weight_files.read(path), settings, elements, energy_unit, {"file": path.name})


def read_hparams(path: str | Path) -> dict[str, Any]:
    """Read the hyperparameters of an hparams.yaml or input.yaml.

    Raises:
      ValueError: The file is not a plain mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: cannot be read as plain YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: expected hyper-parameters by name, received {type(found).__name__}"
        )
    return found


def potential(
    state: Mapping[str, np.ndarray],
    hparams: Mapping[str, Any],
    elements: Sequence[int | str] | None = None,
    energy_unit: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert a state dict to a force field; for arguments and errors see `load`."""
    weights = StateDict(state)
    options = model_options(weights, hparams)
    model = models.create("equivariant_transformer", **options)
    params = {"params": model_params(weights, options)}
    references, scale = reference_energies(weights, hparams), energy_scale(weights)
    _check_box(weights)
    weights.check_all_taken()
    check_shapes(model, params)
    known = _elements(elements, references, len(weights(f"{_MODEL}embedding.weight")))
    metadata = {"source": "TorchMD-Net", "statistics": {"elements": list(known)}} | dict(
        metadata or {}
    )
    return Potential(
        model,
        params,
        options["cutoff"],
        references * energy_unit,
        scale * energy_unit,
        known,
        metadata,
    )


class StateDict:
    """Arrays of a state dict by their names in TorchMD-Net 3.1.0; it records which have been used.

    It also accepts names of older versions and names with the prefix "model.", as saved by a
    training run.
    """

    def __init__(self, state: Mapping[str, np.ndarray]):
        def current(name):
            name = re.sub(r"^model\.", "", name)
            return re.sub(r"(output_network\.\d+\.update_net)\.(\d+)\.", r"\1.layers.\2.", name)

        self._arrays = {current(name): np.asarray(array) for name, array in state.items()}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __call__(self, name: str) -> np.ndarray:
        """Return the array `name`.

        Raises:
          WeightsError: There is no such array.
        """
        if name not in self._arrays:
            raise WeightsError(
                f"the state dict holds no {name!r}; it is not that of an equivariant transformer with "
                f"output model 'Scalar', or not whole. There are {', '.join(sorted(self._arrays)[:8])}, "
                "..."
            )
        self._taken.add(name)
        return self._arrays[name]

    def linear(
        self, name: str, inputs: int, outputs: int, bias: bool = True
    ) -> dict[str, np.ndarray]:
        """Return the kernel (inputs, outputs) and the bias of a linear layer.

        Raises:
          WeightsError: An array is missing, or the kernel has another shape.
        """
        if self(f"{name}.weight").shape != (outputs, inputs):
            raise WeightsError(
                f"{name}.weight must have shape ({outputs}, {inputs}) in this model, received "
                f"{self(f'{name}.weight').shape}"
            )
        found = {"kernel": self(f"{name}.weight").T}
        return found | ({"bias": self(f"{name}.bias")} if bias else {})

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """Return the scale and bias of a layer norm."""
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def names(self, pattern: str) -> list[str]:
        """Return the names that `pattern` matches from their start, sorted."""
        return sorted(name for name in self._arrays if re.match(pattern, name))

    def drop(self, *names: str) -> None:
        """Mark arrays that do not affect the energy as used."""
        self._taken.update(names)

    def check_all_taken(self) -> None:
        """Raise WeightsError if an array was not used.

        Otherwise the model would silently differ from the trained one.
        """
        left = sorted(set(self._arrays) - self._taken)
        if left:
            raise WeightsError(
                f"{len(left)} arrays of the state dict have no place in an equivariant transformer with "
                f"these hyper-parameters: {', '.join(left[:8])}"
            )


def model_options(weights: StateDict, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/equivariant_transformer.py.

    Raises:
      ValueError: A hyperparameter is missing, not supported, or in conflict with the weights.
    """
    shown = _shown(weights)
    _check_hparams(hparams, shown)
    lower, upper = float(hparams["cutoff_lower"]), float(hparams["cutoff_upper"])
    if shown["embedding_dimension"] % int(hparams["num_heads"]):
        raise ValueError(
            f"hyper-parameter num_heads is {hparams['num_heads']}, which does not divide the width of the "
            f"weights, {shown['embedding_dimension']}; do they belong together?"
        )
    centers, widths = _radial_constants(weights, shown["rbf_type"])
    return {
        "num_features": shown["embedding_dimension"],
        "num_layers": shown["num_layers"],
        "num_heads": int(hparams["num_heads"]),
        "cutoff": upper,
        "cutoff_lower": lower,
        "radial_basis": {"expnorm": "expnorm", "gauss": "gaussian"}[shown["rbf_type"]],
        "num_radial": shown["num_rbf"],
        "trainable_rbf": bool(hparams.get("trainable_rbf", False)),
        "radial_centers": centers,
        "radial_widths": widths,
        "activation": ACTIVATIONS[hparams["activation"]],
        "attn_activation": ACTIVATIONS[hparams["attn_activation"]],
        "distance_influence": shown["distance_influence"],
        "neighbor_embedding": shown["neighbor_embedding"],
        "vector_cutoff": bool(hparams.get("vector_cutoff", False)),
        "epsilon": 0.0,
        "head": "gated",
    }


def _shown(weights: StateDict) -> dict[str, Any]:
    """Infer hyperparameters from the state dict."""
    first = f"{_MODEL}attention_layers.0."
    influence = (f"{first}dk_proj.weight" in weights, f"{first}dv_proj.weight" in weights)
    layers = {name.split(".")[2] for name in weights.names(re.escape(f"{_MODEL}attention_layers."))}
    basis = "gauss" if f"{_MODEL}distance_expansion.offset" in weights else "expnorm"
    centers = weights(f"{_MODEL}distance_expansion.{'offset' if basis == 'gauss' else 'means'}")
    embedding = weights(f"{_MODEL}embedding.weight")
    if embedding.ndim != 2 or not embedding.size:
        raise WeightsError(
            f"{_MODEL}embedding.weight must be a table by atomic number, (elements, features), received "
            f"shape {embedding.shape}"
        )
    return {
        "embedding_dimension": embedding.shape[1],
        "num_layers": len(layers),
        "rbf_type": basis,
        "num_rbf": len(centers),
        "neighbor_embedding": f"{_MODEL}neighbor_embedding.embedding.weight" in weights,
        "distance_influence": {
            (True, True): "both",
            (True, False): "keys",
            (False, True): "values",
            (False, False): "none",
        }[influence],
    }


def _check_hparams(hparams, shown) -> None:
    """Raise ValueError if hyperparameters are missing, unsupported or contradict the weights."""
    for name, allowed in _SUPPORTED.items():
        if name in hparams and hparams[name] not in allowed:
            raise ValueError(
                f"hyper-parameter {name} must be {' or '.join(map(repr, allowed))}, received "
                f"{hparams[name]!r}; other models and outputs of TorchMD-Net are not supported"
            )
    missing = [name for name in _REQUIRED if name not in hparams]
    if missing:
        raise ValueError(
            f"the hyper-parameters lack {', '.join(missing)}, which the weights do not show"
        )
    for name in ("activation", "attn_activation"):
        if hparams[name] not in ACTIVATIONS:
            raise ValueError(
                f"hyper-parameter {name} must be one of {', '.join(ACTIVATIONS)}, received "
                f"{hparams[name]!r}"
            )
    for name, value in shown.items():
        if hparams.get(name, value) != value:
            raise ValueError(
                f"hyper-parameter {name} is {hparams[name]!r}, but the weights are of a model with "
                f"{value!r}; do they belong together?"
            )


def _radial_constants(weights: StateDict, basis: str):
    """Return centers and widths of the radial basis."""
    name = f"{_MODEL}distance_expansion."
    if basis == "expnorm":
        centers, widths = weights(f"{name}means"), weights(f"{name}betas")
    else:
        coefficient = weights(f"{name}coeff").astype(np.float64)
        centers, widths = weights(f"{name}offset"), np.sqrt(-0.5 / coefficient).reshape(1)
    return tuple(map(float, centers)), tuple(map(float, widths))


def model_params(weights: StateDict, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert weights to parameters of models/equivariant_transformer.py.

    Arrays that do not affect the energy are dropped: the projections of the vectors in the first
    layer, where the vectors are zero, and the vector output of the last block of the head.
    """
    params: dict[str, Any] = {"embedding": _elements_table(weights(f"{_MODEL}embedding.weight"))}
    if options["trainable_rbf"]:
        params["radial_basis"] = {
            "centers": np.array(options["radial_centers"]),
            "widths": np.array(options["radial_widths"]),
        }
    if options["neighbor_embedding"]:
        name = f"{_MODEL}neighbor_embedding."
        params["neighbors"] = {
            "embedding": _elements_table(weights(f"{name}embedding.weight")),
            "filter": weights.linear(
                f"{name}distance_proj", options["num_radial"], options["num_features"]
            ),
            "mix": weights.linear(
                f"{name}combine", 2 * options["num_features"], options["num_features"]
            ),
        }
    for n in range(options["num_layers"]):
        params |= _layer(weights, options, n)
    return params | {
        "norm": weights.norm(f"{_MODEL}out_norm"),
        "energy": _head(weights, options["num_features"]),
    }


def _elements_table(table):
    """Truncate a table by atomic number, (max_z, F), to 119 rows, or pad it with zeros."""
    missing = max(MAX_ATOMIC_NUMBER + 1 - len(table), 0)
    return np.concatenate(
        [table[: MAX_ATOMIC_NUMBER + 1], np.zeros((missing, *table.shape[1:]), table.dtype)]
    )


def _layer(weights, options, n):
    name, width, has_vectors = f"{_MODEL}attention_layers.{n}.", options["num_features"], n > 0
    values = _by_value(weights.linear(f"{name}v_proj", width, 3 * width), options["num_heads"])
    layer = {
        "norm": weights.norm(f"{name}layernorm"),
        "output": weights.linear(f"{name}o_proj", width, 3 * width),
        "projections": _side_by_side(
            [weights.linear(f"{name}{part}_proj", width, width) for part in ("q", "k")]
            + [values[part] for part in value_names(has_vectors)]
        ),
    }
    if has_vectors:
        layer["vectors"] = weights.linear(f"{name}vec_proj", width, 3 * width, bias=False)
    else:
        weights.drop(f"{name}vec_proj.weight")
        layer["output"] = {part: array[..., 2 * width :] for part, array in layer["output"].items()}
    filters = _filters(
        weights, options, n, filter_names(options["distance_influence"], has_vectors)
    )
    return {f"layer_{n}": layer} | filters


def _filters(weights, options, n, parts):
    if not parts:
        return {}
    name, num, width = (
        f"{_MODEL}attention_layers.{n}.",
        options["num_radial"],
        options["num_features"],
    )
    filters = {}
    if "key" in parts:
        filters["key"] = weights.linear(f"{name}dk_proj", num, width)
    if "to_scalars" in parts:
        filters |= _by_value(weights.linear(f"{name}dv_proj", num, 3 * width), options["num_heads"])
    return {f"layer_{n}_filters": {"dense": _side_by_side([filters[part] for part in parts])}}


def _by_value(linear, heads):
    """Split a linear layer with columns by head, value, channel into its three values.

    The columns of each result are ordered by head, channel.
    """

    def value(array, k):
        return array.reshape(*array.shape[:-1], heads, 3, -1)[..., k, :].reshape(
            *array.shape[:-1], -1
        )

    return {
        part: {name: value(array, k) for name, array in linear.items()}
        for k, part in enumerate(("to_scalars", "along_vectors", "along_pairs"))
    }


def _side_by_side(linears):
    """Concatenate the outputs of linear layers."""
    return {
        name: np.concatenate([linear[name] for linear in linears], axis=-1) for name in linears[0]
    }


def _head(weights, width):
    first, last, half = f"{_HEAD}0.", f"{_HEAD}1.", width // 2
    weights.drop(f"{last}vec2_proj.weight")
    final = weights.linear(f"{last}update_net.layers.2", half, 2)
    return {
        "vectors_1": _side_by_side(
            [
                weights.linear(f"{first}vec1_proj", width, width, bias=False),
                weights.linear(f"{first}vec2_proj", width, half, bias=False),
            ]
        ),
        "hidden_1": weights.linear(f"{first}update_net.layers.0", 2 * width, width),
        "gate": weights.linear(f"{first}update_net.layers.2", width, 2 * half),
        "vectors_2": weights.linear(f"{last}vec1_proj", half, half, bias=False),
        "hidden_2": weights.linear(f"{last}update_net.layers.0", 2 * half, half),
        "final": {name: array[..., :1] for name, array in final.items()},
    }


def energy_scale(weights: StateDict) -> float:
    """Return the standard deviation that scales the energies of the network.

    Raises:
      WeightsError: The mean is not zero. TorchMD-Net adds it once per structure, regardless of its
        size, which a sum of atomic energies cannot represent.
    """
    mean, std = float(weights("mean")), float(weights("std"))
    if mean != 0:
        raise WeightsError(
            f"the state dict adds a mean of {mean:g} to the energy of each structure, whatever its "
            "size; energies here are sums over atoms. Set 'mean' to 0 to go without it: forces, and "
            "differences of energies, stay the same"
        )
    return std


def reference_energies(weights: StateDict, hparams: Mapping[str, Any]) -> np.ndarray:
    """Return the energy of each element from the prior "Atomref", shape (119,), float64.

    It is zero if there is no such prior or it is switched off.

    Raises:
      ValueError: There is another prior, or weights and hyperparameters have different priors.
    """
    total, found = (
        np.zeros(MAX_ATOMIC_NUMBER + 1),
        weights.names(r"prior_model\.(\d+\.)?atomref\.weight$"),
    )
    priors = _priors(hparams)
    for name, _ in priors:
        if name not in ("Atomref", "LearnableAtomref"):
            raise ValueError(
                f"prior_model {name!r} of TorchMD-Net is not supported; Atomref and LearnableAtomref are"
            )
    if len(found) != len(priors):
        raise ValueError(
            f"the hyper-parameters name {len(priors)} priors ({[name for name, _ in priors]}), the "
            f"weights hold {len(found)} ({found}); do they belong together?"
        )
    for name, (_, arguments) in zip(found, priors):
        weights.drop(name.replace("atomref.weight", "initial_atomref"))
        table = _elements_table(weights(name).astype(np.float64).reshape(-1))
        total += table if arguments.get("enable", True) else 0.0
    return total


def _priors(hparams):
    """Return (name, arguments) of each prior, for all forms that TorchMD-Net accepts."""
    given = hparams.get("prior_model") or []
    named = []
    for prior in given if isinstance(given, list | tuple) else [given]:
        named += (
            [(k, v or {}) for k, v in prior.items()]
            if isinstance(prior, Mapping)
            else [(prior, {})]
        )
    arguments = hparams.get("prior_args")
    if arguments is None:
        return named
    arguments = list(arguments) if isinstance(arguments, list | tuple) else [arguments]
    return [(name, given or {}) for (name, _), given in zip(named, arguments)]


def _check_box(weights: StateDict) -> None:
    """Raise WeightsError if the state dict contains a fixed periodic box."""
    name = f"{_MODEL}distance.box"
    if name in weights and weights(name).any():
        raise WeightsError(
            f"the state dict holds a fixed periodic box, {weights(name).tolist()}; here a structure has "
            f"its own cell. Set {name!r} to zeros and give the structures that cell"
        )


def _elements(given, references, rows) -> tuple[int, ...]:
    """Return the atomic numbers of `elements`; None infers them from reference energies."""
    if given is None:
        found = tuple(np.flatnonzero(references).tolist())
        if not found:
            raise ValueError(
                "the weights do not say on which elements they were trained; give elements, such as "
                "elements=('H', 'C', 'N', 'O')"
            )
        return found
    numbers = tuple(
        sorted({atomic_numbers.get(e, -1) if isinstance(e, str) else int(e) for e in given})
    )
    largest = min(rows - 1, MAX_ATOMIC_NUMBER)
    if not numbers or numbers[0] < 1 or numbers[-1] > largest:
        raise ValueError(
            f"elements must be symbols or atomic numbers from 1 to {largest}, received {tuple(given)}"
        )
    return numbers
