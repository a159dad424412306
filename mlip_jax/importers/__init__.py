"""Force fields that were trained elsewhere, read from weights in open formats: one file for each program.

Each has functions that map a flat dict of weights to the options and parameters of one of mlip_jax.models, and
`load(path, ...)`, which gives a `Potential`. Constants that the program keeps (in single precision, most often) are
taken over as they are, so that the numbers agree to rounding.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from mlip_jax.potential import Potential


def names() -> list[str]:
    """Return the names of all importers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def load_force_field(text: str) -> Potential:
    """Load the force field of a workdir, or of a file by the name of its importer: "schnetpack:painn.safetensors".

    Raises:
      CheckpointError, ValueError, FileNotFoundError: There is nothing that can be read, or the file alone does not
        describe a force field.
    """
    importer, colon, path = text.partition(":")
    if not colon or importer not in names():
        return Potential.load(text)
    load = importlib.import_module(f"mlip_jax.importers.{importer}").load
    try:
        inspect.signature(load).bind(path)
    except TypeError as error:
        raise ValueError(
            f"{text}: the file alone does not describe the force field ({error}). Load it in Python with "
            f"mlip_jax.importers.{importer}.load and save it with mlip_jax.importers.parameters.save.") from error
    return load(path)
