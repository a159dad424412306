"""Architectures that read molecular graphs of bonds, without positions: one file each.

`mlip_jax/models/bond_graphs/<name>.py` contains one class `BondModel`, a flax.linen module:
`BondModel(**options)(graph)` returns `BondOutputs` for a batch of graphs/bonds.py. Such a model has
no energies and forces; it predicts properties. `models.find` also finds these models.
"""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """Return the names of all architectures of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)
