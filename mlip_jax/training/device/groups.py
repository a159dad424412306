"""Groups of parameters that an optimizer treats in the same way, as one array each.

The update of all biases, or of all matrices of one shape, is then a single operation on the device.
XLA removes the concatenation of neighboring slices of a vector, so grouping the leaves of a
`Packed` tree costs little.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from mlip_jax.target_device import target_platform
from mlip_jax.training.device.packing import concatenate


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


class Groups:
    """Leaves of a pytree in groups. Each group is one array.

    Args:
      tree: Pytree, whose leaves are grouped. Masked nodes are in no group.
      group_of: Function (path, leaf) -> name of its group. The leaves of a group have one type.
      stacked: Function of the name of a group: whether its array is a stack of matrices
        (n, rows, columns) rather than a vector.
    """

    def __init__(
        self,
        tree: Any,
        group_of: Callable[[Any, Any], str],
        stacked: Callable[[str], bool] = lambda name: False,
    ):
        leaves, self._structure = jax.tree.flatten_with_path(tree, is_leaf=_is_masked)
        self._shapes = [None if _is_masked(x) else x.shape for _, x in leaves]
        self._members: dict[str, list[int]] = {}
        for index, (path, leaf) in enumerate(leaves):
            if not _is_masked(leaf):
                self._members.setdefault(group_of(path, leaf), []).append(index)
        self._stacked = {name for name in self._members if stacked(name)}

    def pack(self, tree: Any) -> dict[str, Any]:
        """Return the array of each group, or a masked node if its leaves are masked."""
        leaves = jax.tree.leaves(tree, is_leaf=_is_masked)
        return {
            name: self._pack_group(name, [leaves[i] for i in m])
            for name, m in self._members.items()
        }

    def _pack_group(self, name: str, leaves: Sequence[Any]) -> Any:
        if _is_masked(leaves[0]):
            return leaves[0]
        matrix = leaves[0].shape[-2:]
        vector = concatenate(leaves)
        return vector.reshape(-1, *matrix) if name in self._stacked else vector

    def unpack(self, groups: dict[str, Any]) -> Any:
        """Return the tree of the arrays of groups."""
        leaves: list[Any] = [optax.MaskedNode()] * len(self._shapes)
        for name, members in self._members.items():
            if _is_masked(groups[name]):
                continue
            vector, shapes = groups[name].reshape(-1), [self._shapes[i] for i in members]
            ends = itertools.accumulate(math.prod(s) for s in shapes)
            for index, shape, end in zip(members, shapes, ends):
                leaves[index] = vector[end - math.prod(shape) : end].reshape(shape)
        return jax.tree.unflatten(self._structure, leaves)

    def map_state(self, function: Callable[[Any], Any], state: Any, structure: Any = None) -> Any:
        """Apply `pack` or `unpack` to those parts of an optimizer's state that are such trees.

        Args:
          function: `pack` or `unpack`.
          state: State of an optimizer.
          structure: Structure of these parts; by default, that of the tree.
        """
        structure = self._structure if structure is None else structure

        def is_part(x):
            return jax.tree.structure(x, is_leaf=_is_masked) == structure

        return jax.tree.map(lambda x: function(x) if is_part(x) else x, state, is_leaf=is_part)


def over_groups(
    rule: optax.GradientTransformation,
    grouped_rule: optax.GradientTransformation,
    groups_of: Callable[[Any], Groups],
) -> optax.GradientTransformation:
    """Return a rule that computes the updates of all leaves of a group at once, except on CPUs.

    The state is that of `rule`, so checkpoints do not depend on the groups.

    Args:
      rule: Rule of the leaves.
      grouped_rule: The same rule for the arrays of groups.
      groups_of: Function of the gradients that returns their groups.
    """

    def update(updates, state, params=None):
        is_single = jax.tree.structure(updates).num_nodes == 1
        if is_single or target_platform() == "cpu":
            return rule.update(updates, state, params)
        groups = groups_of(updates)
        packed = groups.pack(updates)
        packed_updates, packed_state = grouped_rule.update(
            packed,
            groups.map_state(groups.pack, state),
            None if params is None else groups.pack(params),
        )
        structure = jax.tree.structure(packed)
        return groups.unpack(packed_updates), groups.map_state(
            groups.unpack, packed_state, structure
        )

    return optax.GradientTransformation(rule.init, update)
