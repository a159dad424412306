"""Nequix (checked against nequix 0.4.5): files of its JAX form (.nqx).

They are read without running any code in them (formats/nequix_files.py). Lengths are in Å, energies
in eV.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import limits, models
from mlip_jax.importers.formats import nequix_files
from mlip_jax.importers.formats.recorded import table_of
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.tensor_products import convolution
from mlip_jax.models.layers.tensor_products.convolution import convolution_paths, num_weights
from mlip_jax.models.layers.tensor_products.gates import gate_for
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, Irrep, Irreps, natural, parse
from mlip_jax.potential import Potential

_REQUIRED = (
    *("atomic_numbers", "hidden_irreps", "lmax", "cutoff", "n_layers", "radial_basis_size"),
    *("radial_mlp_size", "radial_mlp_layers", "radial_polynomial_p", "index_weights"),
    *("layer_norm", "shift", "scale", "avg_n_neighbors"),
)


def accepts_file(path: str | Path) -> bool:
    """Return whether a file is one of Nequix."""
    return nequix_files.is_nequix(path)


def load(path: str | Path) -> Potential:
    """Load a force field from a file of Nequix.

    Args:
      path: File (.nqx).

    Raises:
      FileNotFoundError: No such file.
      ValueError: The file is corrupted, or the model is not supported.
    """
    settings, arrays = nequix_files.read(path)
    try:
        return _potential(settings, arrays, {"file": Path(path).name})
    except (TypeError, OverflowError) as error:  # settings of other types
        raise WeightsError(f"{path}: invalid settings: {error}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def _potential(settings: Mapping[str, Any], arrays: Sequence[np.ndarray], metadata) -> Potential:
    """Convert the content of a file to a force field."""
    options = model_options(settings)
    model = models.create("nequix", **options)
    references, params = model_params(arrays, model)
    check_shapes(model, {"params": params})
    elements = options["elements"]
    references = references.astype(np.float64) + float(settings["shift"])
    return Potential(
        model,
        {"params": params},
        options["cutoff"],
        table_of(elements, references),
        float(settings["scale"]),
        elements,
        {"source": "Nequix", "statistics": {"elements": list(elements)}} | metadata,
    )


def model_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/nequix.py.

    Raises:
      ValueError: A setting is missing or not supported.
    """
    if missing := [name for name in _REQUIRED if settings.get(name) is None]:
        raise ValueError(f"the settings lack {', '.join(missing)}")
    if settings.get("add_repulsion"):
        raise ValueError("add_repulsion is not supported")
    hidden = parse(str(settings["hidden_irreps"]))
    if [irrep for _, irrep in hidden] != natural(len(hidden) - 1):
        raise ValueError(
            "hidden_irreps must be one irrep for each degree, as in 128x0e + 64x1o, received "
            f"{settings['hidden_irreps']!r}"
        )
    elements = sorted(int(number) for number in settings["atomic_numbers"])
    if len(set(elements)) < len(elements) or not set(elements) <= set(range(1, 119)):
        raise ValueError(f"atomic_numbers must differ and be 1 to 118, received {elements[:9]} ...")
    num_hidden = int(settings["radial_mlp_layers"])
    limits.check("model_layers", num_hidden, "radial_mlp_layers", ValueError)
    power = float(settings["radial_polynomial_p"])
    if not power.is_integer():
        raise ValueError(f"radial_polynomial_p must be an integer, received {power}")
    return {
        "num_features": tuple(channels for channels, _ in hidden),
        "num_layers": int(settings["n_layers"]),
        "max_degree": len(hidden) - 1,
        "harmonics_degree": int(settings["lmax"]),
        "cutoff": float(settings["cutoff"]),
        "cutoff_power": int(power),
        "num_radial": int(settings["radial_basis_size"]),
        "radial_widths": (int(settings["radial_mlp_size"]),) * num_hidden,
        "self_connection": "elements" if settings["index_weights"] else "linear",
        "rms_norm": bool(settings["layer_norm"]),
        "elements": tuple(elements),
        "avg_num_neighbors": float(settings["avg_n_neighbors"]),
        "learned_shift": False,
    }


def model_params(arrays: Sequence[np.ndarray], model) -> tuple[np.ndarray, dict[str, Any]]:
    """Convert arrays to the energies of isolated atoms and the parameters of models/nequix.py.

    Raises:
      WeightsError: There are more or fewer arrays, or they have other shapes.
    """
    take, hidden = _Taker(arrays), model.hidden_irreps()
    references = take("atom_energies", (len(model.elements),))
    params, irreps = {}, ((len(model.elements), SCALAR),)
    for n in range(model.num_layers):
        wanted = hidden if n < model.num_layers - 1 else hidden[:1]
        params[f"layer_{n}"] = _layer(take, f"layers[{n}]", model, irreps, wanted)
        irreps = wanted
    params["energy"] = {"kernel_0": take("readout", (hidden[0][0], 1))}
    take.check_all_taken()
    return references, params


def _layer(take: _Taker, name: str, model, irreps: Irreps, wanted: Irreps) -> dict[str, Any]:
    """Return the parameters of a layer; its arrays have the order of the fields of nequix."""
    harmonics = natural(model.num_harmonics() - 1)
    gate = gate_for(wanted, [irrep for _, irrep in irreps], harmonics)
    paths = convolution_paths(irreps, harmonics, {irrep for _, irrep in gate.inputs})
    widths = [model.num_radial, *model.radial_widths, num_weights(paths)]
    radial = [
        take(f"{name}.radial_mlp", shape) for shape in zip(widths[:-1], widths[1:], strict=True)
    ]
    radial[-1] = _in_order_of_loops(radial[-1], paths)
    rows = (len(model.elements),) if model.self_connection == "elements" else ()
    layer = {
        "radial": {f"kernel_{k}": kernel for k, kernel in enumerate(radial)},
        "linear_1": take.linear(f"{name}.linear_1", irreps, irreps),
        "linear_2": take.linear(f"{name}.linear_2", convolution.output_irreps(paths), gate.inputs),
        "self_connection": take.linear(f"{name}.skip", irreps, gate.inputs, rows),
    }
    if model.rms_norm:
        layer["norm"] = {
            str(irrep): take(f"{name}.layer_norm", (channels,)) for channels, irrep in gate.inputs
        }
    return layer


def _in_order_of_loops(kernel: np.ndarray, paths: tuple[convolution.Path, ...]) -> np.ndarray:
    """Return weights of the paths, which nequix has in the order of the output."""
    ordered, start = np.empty_like(kernel), 0
    for path in paths:
        ordered[:, path.start : path.start + path.channels] = kernel[
            :, start : start + path.channels
        ]
        start += path.channels
    return ordered


class _Taker:
    """Arrays of a file, taken one after the other."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays: Iterator[np.ndarray] = iter(arrays)

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the next array.

        Raises:
          WeightsError: There is none, or it has another shape.
        """
        array = next(self._arrays, None)
        if array is None or array.shape != shape:
            received = "the end of the file" if array is None else f"shape {array.shape}"
            raise WeightsError(
                f"{name} must have shape {shape} in this model, received {received}; do weights and "
                "settings belong together?"
            )
        return array

    def linear(
        self, name: str, inputs: Irreps, outputs: Irreps, rows: tuple[int, ...] = ()
    ) -> dict[str, np.ndarray]:
        """Return the kernels of a linear map by irrep, shape (*rows, inputs, outputs) each."""
        widths: dict[Irrep, int] = {irrep: channels for channels, irrep in outputs}
        return {
            str(irrep): self(name, (*rows, channels, widths[irrep]))
            for channels, irrep in inputs
            if irrep in widths
        }

    def check_all_taken(self) -> None:
        """Raise WeightsError if arrays are left."""
        if left := len(list(self._arrays)):
            raise WeightsError(f"{left} arrays more than this model has")
