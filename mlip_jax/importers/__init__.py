"""Importers of force fields that other programs have trained: one file per program.

They read weights in open formats, and files of PyTorch without running the code in them. Each
importer has functions that convert a flat dict of weights to the options and parameters of one of
mlip_jax.models, and `load(path, ...)`, which returns a `Potential`. Its optional function
`accepts(content)` returns whether the content of a PyTorch file is that of the program, and
`accepts_file(path)` whether another file is one of the program.
Constants that the program stores (usually in single precision) are copied unchanged, so that the
predictions agree to rounding.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.files import VALUE_ERRORS
from mlip_jax.importers.catalog import published_list
from mlip_jax.importers.catalog.added_terms import add_terms, split_term_options
from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.potential import Potential

_SUFFIXES = (".model", ".pt", ".pth", ".ckpt", ".nqx", ".zip", ".npz", ".safetensors")
_EXPECTED = (
    "expected the workdir of a training run, a file of another program, IMPORTER:FILE, the name of a "
    'published force field, a Potential or a calculator, or several of them, as in "runs/a,runs/b"'
)


def names() -> list[str]:
    """Return the names of all importers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def split_force_fields(given: Any) -> list[Any]:
    """Split what names one or several force fields into a list with one item per force field.

    >>> split_force_fields("runs/a, runs/b")
    ['runs/a', 'runs/b']
    >>> split_force_fields("runs/a,X.model#head=mp##dispersion=pbe")
    ['runs/a#dispersion=pbe', 'X.model#head=mp#dispersion=pbe']

    Args:
      given: Force field, in any of the forms that `load_force_field` accepts, several of them
        separated by commas, the calculator of an ensemble, or a sequence of force fields. Options
        after "##" are those of all force fields of a text.

    Raises:
      ValueError: There is no force field, or an object of another kind.
    """
    if isinstance(given, Potential) or hasattr(given, "potential"):
        return [given]
    if hasattr(given, "potentials"):
        return list(given.potentials)
    if isinstance(given, str | Path):
        text = str(given)
        if not text or Path(text).exists():
            parts, shared = [text], ""
        else:
            each, mark, shared = text.partition("##")
            parts, shared = [part.strip() for part in each.split(",")], mark[1:] + shared
        if not all(parts):
            raise ValueError(f"force field: an empty name in {text!r}; {_EXPECTED}")
        return [part + shared for part in parts]
    if isinstance(given, Sequence) and given:
        return [item for part in given for item in split_force_fields(part)]
    raise ValueError(f"force field: received {given!r}; {_EXPECTED}")


def load_force_field(given: Any, **options) -> Potential:
    """Load one force field.

    Args:
      given: Path of a workdir or checkpoint directory; file of another program, for example
        "X.model", whose content selects the importer; "IMPORTER:FILE", for example
        "schnetpack:painn.safetensors"; name of a published force field, for example "sevennet-0"
        (importers/published.py); a `Potential`, which is returned; or a calculator of one. Options
        may follow a file or name, as in "X.model#head=omol#dispersion=pbe"; those of all members of
        an ensemble follow "##".
      **options: Options of the importer, see its function `load`, and of any force field:
        `dispersion` adds the D3(BJ) dispersion of a functional, `k_vectors` changes the number of
        reciprocal vectors of Ewald sums, see catalog/added_terms.py.

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
        path, stated = split_options(items[0])
        options, of_terms = split_term_options(stated | options)
        return add_terms(_load(path, items[0], options), of_terms)
    options, of_terms = split_term_options(options)
    if options:
        raise ValueError(
            f"options {sorted(options)} apply only to files and names; received an object"
        )
    found = items[0] if isinstance(items[0], Potential) else items[0].potential
    return add_terms(found, of_terms)


def _load(path: str, text: str, options: Mapping[str, Any]) -> Potential:
    """Load the force field of a workdir, a file of another program, or a name."""
    keep_compiled_programs()
    importer, colon, file = path.partition(":")
    if not colon or importer not in names():
        importer, file = _importer_of(path), path
    if importer is None:
        if not Path(path).exists() and (near := published_list.nearest(path)):
            raise CheckpointError(
                f"{path}: no such directory, and not the name of a published force field. Did you "
                f"mean {near!r}?"
            )
        if options:
            raise ValueError(f"{path}: options {sorted(options)} apply only to importers")
        return Potential.load(path)
    load = importlib.import_module(f"mlip_jax.importers.{importer}").load
    known = list(inspect.signature(load).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{text}: unknown options {', '.join(unknown)} of the importer {importer}; it has "
            f"{', '.join(known) or 'none'}"
        )
    try:
        inspect.signature(load).bind(file, **options)
    except TypeError as error:
        raise ValueError(
            f"{text}: the file does not describe the force field completely ({error}). Load it "
            f"in Python with mlip_jax.importers.{importer}.load and save it with "
            "mlip_jax.importers.parameters.save."
        ) from error
    try:
        return load(file, **options)
    except ValueError:
        raise
    except VALUE_ERRORS as error:
        raise WeightsError(
            f"{text}: the file is corrupted, or not that of a force field that {importer} loads "
            f"({type(error).__name__}: {error})"
        ) from error


def _importer_of(path: str) -> str | None:
    """Return the importer for a file by its content, or for a name; None for a workdir.

    Raises:
      WeightsError: A file that no importer accepts, or with weights only.
    """
    if published_list.is_known(path) and not Path(path).exists():
        return "published"
    if Path(path).suffix in _SUFFIXES and not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file. Give the path of a file.")
    if not Path(path).is_file():
        return None
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names()}
    if not torch_file.is_torch_file(path):
        for name, module in modules.items():
            if hasattr(module, "accepts_file") and module.accepts_file(path):
                return name
        if Path(path).suffix in (".npz", ".safetensors"):
            raise WeightsError(
                f"{path}: cannot infer the program from weights. State it, as in "
                f"schnetpack:{path}; importers are {', '.join(names())}"
            )
        raise WeightsError(f"{path}: a file without a force field; {_EXPECTED}")
    content = torch_file.read(path)
    for name, module in modules.items():
        if hasattr(module, "accepts") and module.accepts(content):
            return name
    raise WeightsError(
        f"{path}: no importer for this file of PyTorch, {torch_file.describe(content)}. If it has "
        "only weights, state the program, as in mace:FILE, and give its settings in Python: see "
        "mlip_jax.importers."
    )


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """Split options from a path: "X.model#head=omol" gives "X.model" and {"head": "omol"}.

    Numbers become numbers, and "elements" a list of what "+" separates. A path that exists has no
    options.
    """
    if Path(text).exists():
        return text, {}
    path, *parts = text.split("#")
    options: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{text}: expected an option NAME=VALUE after '#', received {part!r}")
        options[name] = value.split("+") if name == "elements" else _number(value)
    return path, options


def _number(text: str) -> float | str:
    """Return a number as such, and any other text unchanged."""
    try:
        return float(text)
    except ValueError:
        return text
