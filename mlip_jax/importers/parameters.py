"""Force fields as two files in open formats: parameters in safetensors, their description in JSON.

    parameters.safetensors   the arrays of the model under "params/...", and "reference_energies"
                             (119,) float64, eV
    parameters.json          architecture with its options, energy terms, cutoff, energy scale,
                             elements, whether forces are the gradient of the energy, metadata

The files contain no code and can be read from any language. `load` restores the result of `save` to
the last bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import linen as nn

from mlip_jax import __version__, models, terms
from mlip_jax.checkpoint import CheckpointError, from_arrays, to_arrays
from mlip_jax.files import atomic_open
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.importers.formats import weights
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.potential import Potential, create_model
from mlip_jax.workdir import write_json

WEIGHTS, DESCRIPTION = "parameters.safetensors", "parameters.json"
_FORMAT, _VERSION = "mlip_jax parameters", 1
_REFERENCE = "reference_energies"


def save(potential: Potential, folder: str | Path) -> Path:
    """Write both files; existing files with these names are replaced.

    Returns:
      Path of the folder.

    Raises:
      ValueError: An option of the model cannot be written as JSON.
      OSError, WorkdirError: The folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        **to_arrays({"params": potential.params}),
        _REFERENCE: np.asarray(potential.reference_energies),
    }
    content = safetensors.numpy.save({name: np.asarray(a, order="C") for name, a in arrays.items()})
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "written_by": f"mlip_jax {__version__}",
        **describe(potential.model),
        "cutoff": potential.cutoff,
        "energy_scale": potential.energy_scale,
        "conservative": potential.conservative,
        "elements": [int(z) for z in potential.elements],
        "sha256": hashlib.sha256(content).hexdigest(),
        "units": {
            "length": "Angstrom",
            "energy": "eV",
            "energy_scale": "eV per unit of the model's output",
        },
        "metadata": potential.metadata,
    }
    # The description is written last. Its checksum confirms that the weights are complete.
    with atomic_open(folder / WEIGHTS) as file:
        file.write(content)
    write_json(folder / DESCRIPTION, description)
    return folder


def describe(model: nn.Module) -> dict[str, Any]:
    """Describe a model of `potential.create_model` for JSON.

    Returns:
      {"model": {"name", "options"}, "terms": {name: options}}.

    Raises:
      ValueError: An option cannot be written as JSON.
    """
    added = {}
    if isinstance(model, terms.WithTerms):
        model, added = model.model, {name: dict(options) for name, options in model.terms}
    options = {
        f.name: getattr(model, f.name)
        for f in dataclasses.fields(model)
        if f.name not in ("parent", "name")
    }
    name = type(model).__module__.rpartition(".")[2]
    for owner, values in ((name, options), *added.items()):
        for option, value in values.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(
                    f"option {option} of {owner!r} cannot be written as JSON: {value!r}; "
                    "expected numbers, strings, or tuples of them"
                ) from error
    return {"model": {"name": name, "options": options}, "terms": added}


def load(folder: str | Path) -> Potential:
    """Load a force field that `save` wrote, from the folder or the path of one of its files.

    Raises:
      FileNotFoundError: One of the files is missing.
      WeightsError (a ValueError): A file is corrupted, has an unsupported version, or does not
        match the other one.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name in (WEIGHTS, DESCRIPTION) else folder
    description = _read_description(folder / DESCRIPTION)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder / WEIGHTS}: no such file; {DESCRIPTION} requires it in the same folder"
        )
    try:
        return _load(folder, description)
    except WeightsError:
        raise
    except Exception as error:  # invalid options make models raise nearly any exception
        raise WeightsError(
            f"{folder / DESCRIPTION}: invalid ({type(error).__name__}: {error}). Save the force "
            "field again."
        ) from error


def _load(folder: Path, description: dict[str, Any]) -> Potential:
    """Load the weights and create the force field of a description."""
    if hashlib.sha256(read_bytes(folder / WEIGHTS)).hexdigest() != description["sha256"]:
        raise WeightsError(
            f"{folder / WEIGHTS}: corrupted, or belongs to another {DESCRIPTION}: its SHA-256 "
            "differs from the recorded one. Save the force field again."
        )
    arrays = weights.read(folder / WEIGHTS)
    reference = arrays.pop(_REFERENCE)
    model = terms.with_terms(create_model(description["model"]), description["terms"])
    _, template = models.outline(model)
    try:
        params = from_arrays(template, arrays, "params/")
    except CheckpointError as error:
        raise WeightsError(f"{folder}: {error}") from error
    return Potential(
        model=model,
        params=params,
        cutoff=description["cutoff"],
        reference_energies=reference,
        energy_scale=description["energy_scale"],
        elements=tuple(description["elements"]),
        metadata=description["metadata"],
    )


def _read_description(path: Path) -> dict[str, Any]:
    """Read and check parameters.json."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Give a folder written by mlip_jax.importers.parameters.save."
        )
    try:
        description = parse_json(read_bytes(path))
    except ValueError as error:
        raise WeightsError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise WeightsError(
            f'{path}: not a description of a force field; "format" must be {_FORMAT!r}'
        )
    if description.get("version") != _VERSION:
        raise WeightsError(
            f"{path}: unsupported version {description.get('version')}; this mlip_jax reads "
            f"version {_VERSION}"
        )
    return description
