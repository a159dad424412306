"""Loop of the batched relaxation of periodic structures; see relaxation/loop.py for the steps.

M   slots        n   atoms per slot
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.graphs import slots as slot_graphs
from mlip_jax.graphs.image_slots import build_with_images, max_images
from mlip_jax.graphs.long_range import in_cells
from mlip_jax.graphs.slots import Box
from mlip_jax.potential import evaluate
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.matrices import matmul, transpose
from mlip_jax.simulation.relaxation.loop import RelaxationLoop
from mlip_jax.simulation.relaxation.state import Cells, Outcome, RelaxationState, empty_symmetry
from mlip_jax.simulation.relaxation.status import RelaxationStatus


@dataclasses.dataclass(frozen=True)
class CellRelaxationLoop(RelaxationLoop):
    """Configuration of the compiled program for periodic structures.

    Attributes:
      filter: Filter that relaxes the cells; None for fixed cells.
      symmetric: Whether the structures keep their space groups.
    """

    filter: CellFilter | None = None
    symmetric: bool = False

    @property
    def num_rows(self) -> int:
        """Return the number of vectors per slot that the minimizer moves."""
        return self.size + (3 if self.filter else 0)

    def init(self) -> RelaxationState:
        """Return the state without any structure."""
        state = super().init()
        one = jnp.broadcast_to(jnp.eye(3, dtype=self.dtype), (self.num, 3, 3))
        symmetry = None
        if self.symmetric:
            symmetry = empty_symmetry((self.num,), self.size, self.dtype)
        cells = Cells(one, jnp.zeros_like(one), jnp.zeros((self.num, 3), bool), one, symmetry)
        return state._replace(now=state.now._replace(cells=cells), largest=jnp.zeros(3, jnp.int32))

    def _empty_outcome(self, num: int) -> Outcome:
        cell = jnp.zeros((num, 3, 3), self.dtype)
        return super()._empty_outcome(num)._replace(cell=cell, stress=cell if self.filter else None)

    def fits(self, budget, largest):
        return super().fits(budget, largest) & (largest[2] <= budget.n_image)

    def _evaluate(self, budget, params, state) -> _CellEvaluation:
        """Evaluate the force field on all slots that fit the padding budget."""
        now, cells = state.now, state.now.cells
        positions, cell = now.positions, cells.reference
        if self.filter:
            by_deformation = transpose(self.filter.deformation(cells.strain))  # F^T - 1
            positions = positions + matmul(positions, by_deformation)
            cell = cell + matmul(cell, by_deformation)
        far = in_cells(self.long_range_cutoff)
        batch, images = build_with_images(
            now.slots, positions, Box(cell, cells.periodic), budget, self.cutoff, far
        )
        # A cell that has collapsed would need ever larger budgets.
        collapsed = ~(images <= max_images(max(self.cutoff, far or 0.0)))
        out = evaluate(
            self.model, params, batch.graph, self.energy_scale, with_stress=bool(self.filter)
        )
        forces = slot_graphs.to_slots(batch, out.forces, self.size)
        rows = jnp.where(now.mobile[:, :, None], forces, 0.0)
        if self.symmetric:
            rows = cells.symmetry.of_forces(rows)
        stress = None
        if self.filter:
            stress = out.stress[:-1]
            kept = cells.symmetry.of_stress(stress) if self.symmetric else stress
            volume = jnp.abs(jnp.linalg.det(cell))
            rows = self.filter.generalized_forces(cells, now.slots.count, rows, kept, volume)
        return _CellEvaluation(
            batch.takes_part | collapsed & (now.slots.count > 0),
            out.energy[:-1],
            forces,
            jnp.sqrt((rows * rows).sum(-1)).max(1),
            batch.nearest,
            batch.max_nearest_distance,
            jnp.stack(
                [
                    batch.n_edge.max(),
                    batch.n_pair.max(),
                    jnp.where(collapsed, 0, images).max().astype(jnp.int32),
                ]
            ).astype(jnp.int32),
            positions,
            cell,
            stress,
            rows,
            collapsed,
        )

    def _classify(self, evaluated, steps, initially_bound):
        code = super()._classify(evaluated, steps, initially_bound)
        return jnp.where(
            evaluated.collapsed & evaluated.takes_part, int(RelaxationStatus.COLLAPSED), code
        )

    def _complete(self, outcome: Outcome, evaluated: _CellEvaluation) -> Outcome:
        return outcome._replace(
            positions=evaluated.positions, cell=evaluated.cell, stress=evaluated.stress
        )

    def _move(self, state, evaluated, moves):
        """Return the structures after a step of the slots `moves`, and the minimizer's state."""
        now, cells = state.now, state.now.cells
        if not self.filter:
            positions, minimizer = self._step(state, now.positions, evaluated.rows, moves)
            return now._replace(positions=positions), minimizer
        count = jnp.maximum(now.slots.count, 1).astype(cells.strain.dtype)[:, None, None]
        rows = jnp.concatenate([now.positions, count * cells.strain], axis=1)
        moved, minimizer = self._step(state, rows, evaluated.rows, moves)
        strain = self.filter.project(cells, moved[:, self.size :] / count)
        strain = jnp.where(moves[:, None, None], strain, cells.strain)
        return now._replace(
            positions=moved[:, : self.size], cells=cells._replace(strain=strain)
        ), minimizer


class _CellEvaluation(NamedTuple):
    """Evaluation of all slots; see `_SlotEvaluation` for the first fields.

    Attributes:
      fmax: Largest norm of a row of `rows` (eV/Å), (M,).
      largest: Edges, pairs and images of the largest slots, (3,) int32.
      positions: Positions in the deformed cells (Å), (M, n, 3).
      cell: Deformed cells (Å), (M, 3, 3).
      stress: Stress (eV/Å³), (M, 3, 3), or None.
      rows: Forces on the rows that the minimizer moves (eV/Å), (M, rows, 3).
      collapsed: Whether the cell has collapsed, (M,) bool.
    """

    takes_part: jax.Array
    energy: jax.Array
    forces: jax.Array
    fmax: jax.Array
    nearest: jax.Array
    max_nearest_distance: jax.Array
    largest: jax.Array
    positions: jax.Array
    cell: jax.Array
    stress: jax.Array | None
    rows: jax.Array
    collapsed: jax.Array
