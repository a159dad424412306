"""TorchMD-Net's equivariant transformer (checked against 3.1.0): checkpoints and state dicts.

A checkpoint (.ckpt) has the state dict and the hyperparameters. It is read without PyTorch and
without running any code in it (formats/torch_file.py). A state dict is incomplete: heads, cutoffs,
activations and priors are among the hyperparameters that torchmd-train also writes to hparams.yaml.
Lengths are in Å. The unit of energies is not stored.

The published behavior is kept: the energy of a model that was trained without `vector_cutoff`
(TorchMD-Net's default) jumps when a pair comes within the cutoff, as it does in TorchMD-Net
(models/equivariant_transformer.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mlip_jax import models
from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.torch_records import plain
from mlip_jax.importers.formats.torchmdnet_settings import (
    REQUIRED,
    model_options,
    priors,
    read_hparams,
)
from mlip_jax.importers.formats.torchmdnet_state import MODEL, StateDict
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.distance_filters import filter_names, value_names
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential

_HEAD = "output_model.output_network."


def accepts(content: Any) -> bool:
    """Return whether the content of a file of torch.save is a checkpoint of TorchMD-Net."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return False
    names = content["state_dict"]
    return any(str(name).removeprefix("model.").startswith(MODEL) for name in names)


def load(
    path: str | Path,
    hparams: Mapping[str, Any] | str | Path | None = None,
    elements: Sequence[int | str] | None = None,
    energy_unit: float = 1.0,
) -> Potential:
    """Load a force field from a checkpoint or from saved weights.

    Args:
      path: Checkpoint (.ckpt), or .npz or .safetensors file with the state dict of the model.
      hparams: Arguments of TorchMD-Net's create_model, or the path of a YAML file with them; None
        for those in the checkpoint, or for hparams.yaml in the folder of the weights.
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
    if path.suffix not in (".npz", ".safetensors"):
        state, stored = _read_checkpoint(path)
        settings = stored if hparams is None else hparams
        settings = settings if isinstance(settings, Mapping) else read_hparams(settings)
        return potential(state, settings, elements, energy_unit, {"file": path.name})
    if hparams is None:
        hparams = path.with_name("hparams.yaml")
        if not hparams.is_file():
            raise ValueError(
                f"{path}: hyperparameters are missing: {', '.join(REQUIRED)}. Give hparams, "
                "a dict or the hparams.yaml of the training run (there is none next to the "
                "file)."
            )
    settings = hparams if isinstance(hparams, Mapping) else read_hparams(hparams)
    return potential(weight_files.read(path), settings, elements, energy_unit, {"file": path.name})


def _read_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the state dict and the hyperparameters of a checkpoint."""
    content = torch_file.read(path)
    if not accepts(content):
        raise WeightsError(f"{path}: not a checkpoint of TorchMD-Net")
    hparams = plain(content.get("hyper_parameters"))
    if not isinstance(hparams, dict):
        raise WeightsError(f"{path}: the checkpoint has no hyperparameters; give hparams")
    arrays = {k: v for k, v in content["state_dict"].items() if isinstance(v, np.ndarray)}
    return arrays, hparams


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
    weights.check_all_used()
    check_shapes(model, params)
    known = _elements(elements, references, len(weights(f"{MODEL}embedding.weight")))
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


def model_params(weights: StateDict, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert weights to parameters of models/equivariant_transformer.py.

    Arrays that do not affect the energy are dropped: the projections of the vectors in the first
    layer, where the vectors are zero, and the vector output of the last block of the head.
    """
    params: dict[str, Any] = {"embedding": _elements_table(weights(f"{MODEL}embedding.weight"))}
    if options["trainable_rbf"]:
        params["radial_basis"] = {
            "centers": np.array(options["radial_centers"]),
            "widths": np.array(options["radial_widths"]),
        }
    if options["neighbor_embedding"]:
        name = f"{MODEL}neighbor_embedding."
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
        "norm": weights.norm(f"{MODEL}out_norm"),
        "energy": _head(weights, options["num_features"]),
    }


def _elements_table(table):
    """Truncate a table by atomic number, (max_z, F), to 119 rows, or pad it with zeros."""
    missing = max(MAX_ATOMIC_NUMBER + 1 - len(table), 0)
    return np.concatenate(
        [table[: MAX_ATOMIC_NUMBER + 1], np.zeros((missing, *table.shape[1:]), table.dtype)]
    )


def _layer(weights, options, n):
    """Return the parameters of layer n, including its filters."""
    name, width, has_vectors = f"{MODEL}attention_layers.{n}.", options["num_features"], n > 0
    values = _split_by_value(
        weights.linear(f"{name}v_proj", width, 3 * width), options["num_heads"]
    )
    layer = {
        "norm": weights.norm(f"{name}layernorm"),
        "output": weights.linear(f"{name}o_proj", width, 3 * width),
        "projections": _concatenate_outputs(
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
    """Return the parameters of the filters `parts` of layer n."""
    if not parts:
        return {}
    name, num, width = (
        f"{MODEL}attention_layers.{n}.",
        options["num_radial"],
        options["num_features"],
    )
    filters = {}
    if "key" in parts:
        filters["key"] = weights.linear(f"{name}dk_proj", num, width)
    if "to_scalars" in parts:
        filters |= _split_by_value(
            weights.linear(f"{name}dv_proj", num, 3 * width), options["num_heads"]
        )
    return {
        f"layer_{n}_filters": {"dense": _concatenate_outputs([filters[part] for part in parts])}
    }


def _split_by_value(linear, heads):
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


def _concatenate_outputs(linears):
    """Concatenate the outputs of linear layers."""
    return {
        name: np.concatenate([linear[name] for linear in linears], axis=-1) for name in linears[0]
    }


def _head(weights, width):
    """Return the parameters of the gated energy head."""
    first, last, half = f"{_HEAD}0.", f"{_HEAD}1.", width // 2
    weights.drop(f"{last}vec2_proj.weight")
    final = weights.linear(f"{last}update_net.layers.2", half, 2)
    return {
        "vectors_1": _concatenate_outputs(
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
            f"the state dict adds a mean of {mean:g} to the energy of each structure, "
            "independent of its size; energies here are sums over atoms. Set 'mean' to 0 to "
            "drop it: forces and energy differences stay the same."
        )
    return std


def reference_energies(weights: StateDict, hparams: Mapping[str, Any]) -> np.ndarray:
    """Return the energy of each element from the prior "Atomref", shape (119,), float64.

    It is zero if there is no such prior or it is switched off.

    Raises:
      ValueError: There is another prior, or weights and hyperparameters have different priors.
    """
    total = np.zeros(MAX_ATOMIC_NUMBER + 1)
    tables = weights.names(r"prior_model\.(\d+\.)?atomref\.weight$")
    listed = priors(hparams)
    for name, _ in listed:
        if name not in ("Atomref", "LearnableAtomref"):
            raise ValueError(
                f"unsupported prior_model {name!r} of TorchMD-Net; supported are Atomref and "
                "LearnableAtomref"
            )
    if len(tables) != len(listed):
        raise ValueError(
            f"the hyperparameters list {len(listed)} priors ({[name for name, _ in listed]}), "
            f"the weights contain {len(tables)} ({tables}). Check that hyperparameters and "
            "weights belong together."
        )
    for name, (_, arguments) in zip(tables, listed):
        weights.drop(name.replace("atomref.weight", "initial_atomref"))
        table = _elements_table(weights(name).astype(np.float64).reshape(-1))
        total += table if arguments.get("enable", True) else 0.0
    return total


def _check_box(weights: StateDict) -> None:
    """Raise WeightsError if the state dict contains a fixed periodic box."""
    name = f"{MODEL}distance.box"
    if name in weights and weights(name).any():
        raise WeightsError(
            f"the state dict contains a fixed periodic box, {weights(name).tolist()}; here "
            f"each structure has its own cell. Set {name!r} to zeros and give the structures "
            "that cell."
        )


def _elements(elements, references, rows) -> tuple[int, ...]:
    """Return the atomic numbers of `elements`; None infers them from reference energies."""
    if elements is None:
        known = tuple(np.flatnonzero(references).tolist())
        if not known:
            raise ValueError(
                "the weights do not record the elements of the training data. Give elements, "
                "such as elements=('H', 'C', 'N', 'O')."
            )
        return known
    numbers = tuple(
        sorted({atomic_numbers.get(e, -1) if isinstance(e, str) else int(e) for e in elements})
    )
    largest = min(rows - 1, MAX_ATOMIC_NUMBER)
    if not numbers or numbers[0] < 1 or numbers[-1] > largest:
        raise ValueError(
            f"elements must be symbols or atomic numbers from 1 to {largest}, received "
            f"{tuple(elements)}"
        )
    return numbers
