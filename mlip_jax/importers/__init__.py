"""Importers of force fields that other programs have trained: one file per program.

They read weights in open formats. Each importer has functions that convert a flat dict of weights
to the options and parameters of one of mlip_jax.models, and `load(path, ...)`, which returns a
`Potential`. Constants that the program stores (usually in single precision) are copied unchanged,
so that the predictions agree to rounding.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.potential import Potential


def names() -> list[str]:
    """Return the names of all importers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def load_force_field(text: str) -> Potential:
    """Load the force field of a workdir, or of a file with the name of its importer.

    Args:
      text: Path of a workdir or checkpoint directory, or "IMPORTER:FILE", for example
        "schnetpack:painn.safetensors".

    Raises:
      CheckpointError, ValueError, FileNotFoundError: There is no readable force field, or the file
        does not describe it completely.
    """
    keep_compiled_programs()
    importer, colon, path = text.partition(":")
    if not colon or importer not in names():
        return Potential.load(text)
    load = importlib.import_module(f"mlip_jax.importers.{importer}").load
    try:
        inspect.signature(load).bind(path)
    except TypeError as error:
        raise ValueError(
            f"{text}: the file does not describe the force field completely ({error}). Load it "
            f"in Python with mlip_jax.importers.{importer}.load and save it with "
            "mlip_jax.importers.parameters.save."
        ) from error
    return load(path)
