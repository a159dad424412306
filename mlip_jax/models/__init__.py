"""Architectures: one file each, found by its name.

`mlip_jax/models/<name>.py` holds one class `Model`, a flax.linen module: `Model(**options)(graph)` gives
`AtomOutputs`. A model knows nothing of data, losses or configs. The building blocks that models share are in `layers/`.
"""

from __future__ import annotations

import importlib
import pkgutil


def names() -> list[str]:
    """Names of the architectures that there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def find(name: str) -> type:
    """The class `Model` of the architecture `name`.

    Raises:
      ValueError: No model has that name; the message says which there are.
    """
    from mlip_jax.config import unknown_name
    if name not in names():
        raise ValueError(unknown_name("model", name, names()))
    return importlib.import_module(f"{__name__}.{name}").Model


def create(name: str, **options):
    """The model `name` with `options`, the fields of its class.

    Raises:
      ValueError: No model has that name, or it has no such option; the message says which there are.
    """
    from mlip_jax.config import unknown_name
    model = find(name)
    known = [f for f in model.__dataclass_fields__ if f not in ("parent", "name")]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of model {name!r}", option, known))
    return model(**options)
