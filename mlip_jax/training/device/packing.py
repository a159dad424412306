"""Pytrees as a few vectors, so that a device starts few kernels and a call passes few arrays.

A model has hundreds of parameter arrays, most of them small. On a GPU, the time of an operation on
a small array is that of its launch, and each array that a call passes takes time on the host.

The training step therefore keeps its state in such vectors, except on CPUs, which spend more time
on the copies than on the calls.

    >>> packed = Packed.of({"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)})
    >>> [v.shape for v in packed.vectors]
    [(8,)]
    >>> packed.tree()["a"].shape
    (2, 3)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.target_device import target_platform


class PackedLayout(NamedTuple):
    """Structure of a packed pytree: of the tree, and shape and type of each leaf."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[np.dtype, ...]

    @property
    def vector_types(self) -> list[np.dtype]:
        """Types of the vectors, in the order of their first leaves."""
        return list(dict.fromkeys(self.types))


@functools.lru_cache
def _share(layout: PackedLayout) -> PackedLayout:
    """Return one object for equal layouts, which compares faster."""
    return layout


@jax.tree_util.register_pytree_node_class
class Packed:
    """Pytree whose leaves are one vector per type.

    Attributes:
      vectors: Concatenated leaves of each type, (..., N), with any leading axes.
      layout: Structure of the tree.
    """

    def __init__(self, vectors: Sequence[Any], layout: PackedLayout):
        self.vectors, self.layout = tuple(vectors), layout

    @classmethod
    def of(cls, tree: Any) -> Packed:
        """Pack the leaves of a tree, in their order. NumPy arrays stay on the host."""
        leaves, structure = jax.tree.flatten(tree)
        types = tuple(np.dtype(x.dtype) for x in leaves)
        layout = _share(PackedLayout(structure, tuple(tuple(x.shape) for x in leaves), types))
        numpy = np if all(isinstance(x, np.ndarray | np.generic) for x in leaves) else jnp
        return cls(
            [
                concatenate([x for x, t in zip(leaves, types) if t == kind], numpy)
                for kind in layout.vector_types
            ],
            layout,
        )

    def tree(self) -> Any:
        """Return the tree, whose leaves keep the leading axes of the vectors."""
        vectors = dict(zip(self.layout.vector_types, self.vectors))
        ends, leaves = dict.fromkeys(vectors, 0), []
        for shape, kind in zip(self.layout.shapes, self.layout.types):
            begin, ends[kind] = ends[kind], ends[kind] + math.prod(shape)
            piece = vectors[kind][..., begin : ends[kind]]
            leaves.append(piece.reshape((*piece.shape[:-1], *shape)))
        return jax.tree.unflatten(self.layout.structure, leaves)

    def tree_flatten(self):
        return self.vectors, self.layout

    @classmethod
    def tree_unflatten(cls, layout, vectors):
        return cls(vectors, layout)


def pack(tree: Any) -> Any:
    """Return a tree as `Packed`, but unchanged for a CPU, on which copies cost more than calls."""
    return tree if target_platform() == "cpu" else Packed.of(tree)


def unpack(tree: Any) -> Any:
    """Return a pytree in which every `Packed` is replaced by its tree."""

    def is_packed(x):
        return isinstance(x, Packed)

    return jax.tree.map(lambda x: x.tree() if is_packed(x) else x, tree, is_leaf=is_packed)


def concatenate(arrays: Sequence[Any], numpy: Any = jnp) -> Any:
    """Concatenate arrays as vectors."""
    vectors = [x.reshape(-1) for x in arrays]
    return vectors[0] if len(vectors) == 1 else numpy.concatenate(vectors)
