"""Force fields compiled for structures that are padded to a few sizes.

A structure is packed into two flat arrays on the host (`CompiledForceField.pack`). The compiled
program restores the graph from them and evaluates the force field (`run`, `run_hessian`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed

from mlip_jax.graphs.neighbors import Neighbors, long_range_list, neighbor_list
from mlip_jax.graphs.shapes import SizeBucket, SizeBuckets
from mlip_jax.potential import Evaluation
from mlip_jax.simulation.calculators.packing import pack, unpack
from mlip_jax.simulation.shared_programs import kept_for_equal_arguments
from mlip_jax.structure import electronic_value

log = logging.getLogger(__name__)

# _COLUMN_EDGES: maximum number of Hessian columns times directed edges of a block; a column takes a
# few kilobytes per edge.
_COLUMN_EDGES = 1 << 16


class PureForceField(Protocol):
    """One or several force fields without their parameters, whose functions are pure.

    It is hashable. Equal ones have the same compiled programs.
    """

    def evaluate(self, params: Any, graph: jraph.GraphsTuple, with_stress: bool) -> Evaluation:
        """Evaluate the force fields. With several, the arrays have a leading axis."""

    def hessian_columns(
        self, params: Any, graph: jraph.GraphsTuple, directions: jax.Array
    ) -> jax.Array:
        """Compute columns of the Hessian as `potential.hessian_columns`."""


@dataclasses.dataclass(eq=False, kw_only=True)
class CompiledForceField:
    """One or several force fields, compiled once per size bucket.

    Objects with equal `force_field` share the compiled programs. The parameters are copied to the
    device before the first compilation.

    Attributes:
      params: Function that returns the parameters, a pytree of host arrays.
      force_field: Function that returns the force fields without their parameters.
      predicted: Names of the per-atom predictions to return in addition to energies.
      dtype: Dtype of the calculation.
      cutoff: Cutoff radius (Å).
      long_range_cutoff: Cutoff radius of the long-range pairs (Å), or None.
    """

    params: Callable[[], Any]
    force_field: Callable[[], PureForceField]
    predicted: tuple[str, ...]
    dtype: np.dtype
    cutoff: float
    long_range_cutoff: float | None

    def __post_init__(self):
        self._buckets = SizeBuckets(self.long_range_cutoff)
        self._used: set[tuple] = set()

    @property
    def num_compiles(self) -> int:
        """Return the number of programs that this object has used."""
        return len(self._used)

    def pack(
        self, atoms: Atoms, positions: np.ndarray
    ) -> tuple[SizeBucket, tuple[np.ndarray, np.ndarray]]:
        """Return the size bucket of the structure and its packed arrays.

        Raises:
          CalculationFailed: If two atoms have the same position.
        """
        pbc = atoms.pbc
        periodic = bool(pbc.any())
        box = (atoms.cell.array, pbc) if periodic else (None, None)
        neighbors = neighbor_list(positions, self.cutoff, *box)
        _check_apart(positions, neighbors)
        long_range, n_pair = None, None
        if self.long_range_cutoff is not None:
            long_range = long_range_list(positions, self.long_range_cutoff, *box)
            n_pair = len(long_range[0])
        bucket = self._buckets.choose(len(atoms), len(neighbors.senders), n_pair, periodic)
        return bucket, pack(
            atoms.numbers,
            positions,
            neighbors,
            bucket,
            self.dtype,
            charge=electronic_value(atoms, "charge"),
            spin=electronic_value(atoms, "num_unpaired_electrons"),
            cell=box[0],
            long_range=long_range,
        )

    def run(self, bucket: SizeBucket, floats: np.ndarray, ints: np.ndarray, with_stress: bool):
        """Run the compiled evaluation; compile it for a new size bucket.

        Returns:
          Atomic energies, forces and predictions, concatenated, (..., nodes, 4 + predictions), and
          the stress or None.
        """
        evaluation, _, leaves = self._programs
        self._used.add((bucket, with_stress))
        return evaluation(leaves, bucket, floats, ints, with_stress)

    def run_hessian(
        self, bucket: SizeBucket, floats: np.ndarray, ints: np.ndarray, start: np.int32
    ) -> jax.Array:
        """Compute `columns_at_once(bucket)` columns of the Hessian from `start` on.

        Returns:
          Columns, (columns, nodes, 3). Those of padding atoms are zero.
        """
        _, hessian, leaves = self._programs
        columns = columns_at_once(bucket)
        self._used.add((bucket, columns, "Hessian"))
        return hessian(leaves, bucket, floats, ints, start, columns)

    @functools.cached_property
    def _programs(self):
        """Return the compiled evaluation, the compiled Hessian and the parameters on the device."""
        # Parameters are an argument: as fast as constants, but not copied into each program.
        leaves, structure = jax.tree.flatten(self.params())
        evaluation, hessian = _shared_functions(self.force_field(), self.predicted, structure)
        return evaluation, hessian, jax.device_put(leaves)


@kept_for_equal_arguments
def _shared_functions(force_field: PureForceField, predicted: tuple[str, ...], structure):
    """Return the functions of `_trace` and `_trace_hessian`, compiled once per shape.

    A user may create a calculator per molecule. Those of equal models get the same functions.
    """
    return (
        jax.jit(
            functools.partial(_trace, force_field, predicted, structure), static_argnums=(1, 4)
        ),
        jax.jit(functools.partial(_trace_hessian, force_field, structure), static_argnums=(1, 5)),
    )


def _trace(force_field, predicted, structure, leaves, bucket, floats, ints, with_stress):
    """Evaluate the force fields, see `CompiledForceField.run`."""
    log.info("compiling energies and forces of up to %d atoms", bucket.budget.n_node - 1)
    params, graph = jax.tree.unflatten(structure, leaves), unpack(bucket, floats, ints)
    out = force_field.evaluate(params, graph, with_stress)
    columns = [
        out.energies[..., None],
        out.forces,
        *(out.properties[name][..., None] for name in predicted),
    ]
    # the host sums the energies in float64
    return jnp.concatenate(columns, axis=-1), out.stress


def _trace_hessian(force_field, structure, leaves, bucket, floats, ints, start, num_columns):
    """Compute columns of the Hessian, see `CompiledForceField.run_hessian`."""
    log.info("compiling the Hessian of up to %d atoms", bucket.budget.n_node - 1)
    params, graph = jax.tree.unflatten(structure, leaves), unpack(bucket, floats, ints)
    columns = start + jnp.arange(num_columns)
    # (columns, 3 nodes)
    directions = jax.nn.one_hot(columns, 3 * bucket.budget.n_node, dtype=floats.dtype)
    return force_field.hessian_columns(
        params, graph, directions.reshape(-1, bucket.budget.n_node, 3)
    )


def columns_at_once(bucket: SizeBucket) -> int:
    """Return the number of Hessian columns of a block."""
    budget = bucket.budget
    return int(
        np.clip(_COLUMN_EDGES // max(budget.n_edge + budget.n_pair, 1), 1, 3 * (budget.n_node - 1))
    )


def _check_apart(positions: np.ndarray, neighbors: Neighbors) -> None:
    """Raise CalculationFailed if two atoms coincide: zero-length edges count as padding."""
    same = (positions[neighbors.senders] == positions[neighbors.receivers]).all(axis=1)
    if neighbors.shifts is not None:
        same &= ~neighbors.shifts.any(axis=1)
    if same.any():
        edge = int(np.argmax(same))
        raise CalculationFailed(
            f"atoms {neighbors.receivers[edge]} and {neighbors.senders[edge]} have the same "
            "position; their forces are undefined"
        )
