"""Architectures: one file each, found by name.

`mlip_jax/models/<name>.py` contains one class `Model`, a flax.linen module:
`Model(**options)(graph)` returns `AtomOutputs`. A model does not depend on data, losses or configs.
Building blocks that several models share are in `layers/`. `bond_graphs/` contains models that read
bonds in place of positions, and have no energies.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlip_jax import limits
from mlip_jax.models import bond_graphs


def names() -> list[str]:
    """Return the names of all architectures that read positions."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def find(name: str) -> type:
    """Return the class `Model` of the architecture `name`.

    Raises:
      ValueError: Unknown model; the message lists the known ones.
    """
    from mlip_jax.config import unknown_name

    if name in bond_graphs.names():
        return importlib.import_module(f"{bond_graphs.__name__}.{name}").BondModel
    if name not in names():
        raise ValueError(unknown_name("model", name, [*names(), *bond_graphs.names()]))
    return importlib.import_module(f"{__name__}.{name}").Model


def reads_bonds(model: Any) -> bool:
    """Return whether a model, or its backbone, reads molecular graphs of bonds (graphs/bonds.py)."""
    return getattr(getattr(model, "backbone", model), "bonds_only", False)


def reads_positions(model: Any) -> bool:
    """Return whether a model, or its backbone, reads positions."""
    return not reads_bonds(model) or getattr(
        getattr(model, "backbone", model), "needs_positions", False
    )


def max_heavy_atoms(model: Any) -> int | None:
    """Return the largest number of heavy atoms that a model, or its backbone, can read, or None."""
    return getattr(getattr(model, "backbone", model), "max_atoms", None)


def check_positions(name: str) -> None:
    """Raise ValueError if the model `name` has no energies."""
    if name in bond_graphs.names():
        raise ValueError(
            f"the model {name!r} reads the bonds of a SMILES: it predicts properties "
            f"(configs/force2prop.py:scratch,{name}), not energies and forces"
        )


def new_run_options(name: str) -> dict[str, Any]:
    """Return the options that new runs of the model `name` use in place of its defaults.

    The defaults are the published values, which older checkpoints imply. A model lists the others
    as `NEW_RUN_OPTIONS`.
    """
    return dict(getattr(find(name), "NEW_RUN_OPTIONS", {}))


def outline(model, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Return the outputs and parameters of a model as `jax.ShapeDtypeStruct`s.

    The model is traced for a small graph, but not compiled. Results are kept, because a calculator
    needs them several times and tracing takes a large part of the time of a first energy.

    Args:
      model: Model, also with energy terms.
      dtype: dtype of the positions.
    """
    dtype = np.dtype(dtype)
    try:
        hash(model)
    except TypeError:  # an option is an array or a list
        return _trace_outline(model, dtype)
    return _cached_outline(model, dtype)


def _trace_outline(model, dtype):
    """Trace a model; see `outline`."""
    import jax

    from mlip_jax.graphs.graph import example_graph
    from mlip_jax.matmul_precision import full_precision

    x64 = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    # at the precision of the force evaluation, which then reuses the compiled constants
    with x64, full_precision():
        return jax.eval_shape(model.init_with_output, jax.random.key(0), example_graph(dtype))


_cached_outline = functools.lru_cache(maxsize=32)(_trace_outline)


def uses_average_neighbors(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether the model `name` with these options scales messages by `avg_num_neighbors`."""
    fields = find(name).__dataclass_fields__
    if "message_normalization" in fields:
        default = fields["message_normalization"].default
        return options.get("message_normalization", default) == "avg_num_neighbors"
    return "avg_num_neighbors" in fields


def check_elements(model, numbers) -> None:
    """Raise ValueError if a model with weights for certain elements has none for an atomic number.

    Without this check, the atoms would get the weights of another element.

    Args:
      model: Model, also with energy terms.
      numbers: Atomic numbers of the training data.
    """
    from ase.data import chemical_symbols

    known = getattr(getattr(model, "model", model), "elements", None)
    missing = set() if known is None else set(map(int, numbers)) - set(map(int, known))
    if missing:
        symbols = ", ".join(chemical_symbols[z] for z in sorted(missing))
        every = ",".join(str(z) for z in sorted({*map(int, known), *missing}))
        raise ValueError(
            f"the data contain {symbols}, for which the model has no weights. Set "
            f"--config.model.options.elements={every}, or remove these structures with "
            "--config.data.elements."
        )


def create(name: str, **options):
    """Create the model `name` with `options`, the fields of its class.

    Raises:
      ValueError: Unknown model or option; the message lists the known ones.
    """
    from mlip_jax.config import unknown_name

    model = find(name)
    known = [f for f in model.__dataclass_fields__ if f not in ("parent", "name")]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of model {name!r}", option, known))
    check_sizes(name, options)
    return model(**options)


def check_sizes(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if an option, which may come from a file, would take too much memory or time.

    Args:
      name: Name of the model or the energy term.
      options: Its options.
    """
    for option, value in options.items():
        kind = "model_layers" if option == "num_layers" else "option_value"
        kind = "model_degree" if "degree" in option else kind
        values = value if isinstance(value, tuple | list) else [value]
        source = f"option {option} of {name!r}"
        limits.check("option_value", len(values), source, ValueError)
        for number in values:
            if isinstance(number, int) and not isinstance(number, bool):
                limits.check(kind, abs(number), source, ValueError)
