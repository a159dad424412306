"""Force fields that were trained elsewhere, read from weights in open formats: one file for each program.

Each has functions that map a flat dict of weights to the options and parameters of one of mlip_jax.models, and
`load(path, ...)`, which gives a `Potential`. Constants that the program keeps (in single precision, most often) are
taken over as they are, so that the numbers agree to rounding.
"""

from __future__ import annotations

import importlib

from mlip_jax.potential import Potential

# Programs whose files can be named where a workdir is asked for; mlff keeps its settings elsewhere.
BY_NAME = ("so3lr", "schnetpack", "torchmdnet", "parameters")


def load_force_field(text: str) -> Potential:
    """The force field of a workdir, or of what one of BY_NAME reads: "schnetpack:painn.safetensors".

    Raises:
      CheckpointError, ValueError, FileNotFoundError: Nothing that can be read is there.
    """
    importer, colon, path = text.partition(":")
    if colon and importer in BY_NAME:
        return importlib.import_module(f"mlip_jax.importers.{importer}").load(path)
    return Potential.load(text)
