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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.potential import Potential

_EXPECTED = (
    "expected the workdir of a training run, IMPORTER:FILE, a Potential or a calculator, or several "
    'of them, as in "runs/a,runs/b"'
)


def names() -> list[str]:
    """Return the names of all importers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def split_force_fields(given: Any) -> list[Any]:
    """Split what names one or several force fields into a list with one item per force field.

    >>> split_force_fields("runs/a, runs/b")
    ['runs/a', 'runs/b']

    Args:
      given: Force field, in any of the forms that `load_force_field` accepts, several of them
        separated by commas, the calculator of an ensemble, or a sequence of force fields.

    Raises:
      ValueError: There is no force field, or an object of another kind.
    """
    if isinstance(given, Potential) or hasattr(given, "potential"):
        return [given]
    if hasattr(given, "potentials"):
        return list(given.potentials)
    if isinstance(given, str | Path):
        text = str(given)
        whole = not text or "," not in text or Path(text).exists()
        items = [text] if whole else [part.strip() for part in text.split(",")]
        if not all(items):
            raise ValueError(f"force field: an empty name in {text!r}; {_EXPECTED}")
        return items
    if isinstance(given, Sequence) and given:
        return [item for part in given for item in split_force_fields(part)]
    raise ValueError(f"force field: received {given!r}; {_EXPECTED}")


def load_force_field(given: Any) -> Potential:
    """Load one force field.

    Args:
      given: Path of a workdir or checkpoint directory; "IMPORTER:FILE", for example
        "schnetpack:painn.safetensors"; a `Potential`, which is returned; or a calculator of one.

    Raises:
      CheckpointError, ValueError, FileNotFoundError: There is no readable force field, there are
        several, or the file does not describe it completely.
    """
    items = split_force_fields(given)
    if len(items) > 1:
        raise ValueError(
            f"expected one force field, received {len(items)}. An ensemble is evaluated by "
            "configs/evaluate.py and by EnsembleCalculator."
        )
    if isinstance(items[0], str):
        return _load(items[0])
    return items[0] if isinstance(items[0], Potential) else items[0].potential


def _load(text: str) -> Potential:
    """Load the force field of a workdir, or of a file with the name of its importer."""
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
