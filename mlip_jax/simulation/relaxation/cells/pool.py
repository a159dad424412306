"""Periodic structures of one size class on one device."""

from __future__ import annotations

import numpy as np

from mlip_jax.graphs.image_slots import ImageBudget, count_images
from mlip_jax.graphs.long_range import in_cells
from mlip_jax.graphs.neighbors import count_edges, long_range_list
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.loop import CellRelaxationLoop
from mlip_jax.simulation.relaxation.pool import SlotPool
from mlip_jax.simulation.relaxation.state import Cells, MoleculeBatch, empty_symmetry

# SMALLEST_CELL: atoms of the smallest slots. Primitive cells have few atoms and many images.
SMALLEST_CELL = 4
# _MAX_CANDIDATES: pairs of atoms and images of a batch that are examined for neighbors.
_MAX_CANDIDATES = 1 << 25
# _IMAGE_SLACK: ratio of a larger number of images to the required one.
_IMAGE_SLACK = 1.3


class CellPool(SlotPool):
    """Periodic structures of one size class on one device, with the program that relaxes them."""

    def __init__(self, *args, filter: CellFilter | None, symmetric: bool = False, **options):
        """Create an empty pool.

        Args:
          filter: Filter that relaxes the cells; None for fixed cells.
          symmetric: Whether the structures keep their space groups.
          args, options: See `SlotPool`.
        """
        super().__init__(*args, **options)
        self._filter, self._symmetric, self._n_image = filter, symmetric, 1

    def _num_slots(self, sizes) -> int:
        reach = max(self._potential.cutoff, in_cells(self._potential.long_range_cutoff) or 0.0)
        counts = [count_images(w.cell, w.periodic, reach) for w in self._waiting]
        self._n_image = max(counts, default=1)
        candidates = self._size**2 * self._n_image
        return min(super()._num_slots(sizes), max(_MAX_CANDIDATES // candidates, 1))

    def _count_pairs(self, sizes) -> tuple[np.ndarray, np.ndarray]:
        p = self._potential
        edges = [count_edges(w.positions, p.cutoff, w.cell, w.periodic) for w in self._waiting]
        pairs = np.zeros(len(edges))
        if p.long_range_cutoff is not None:
            far = p.long_range_cutoff
            pairs = [
                len(long_range_list(w.positions, far, w.cell, w.periodic)[0]) for w in self._waiting
            ]
        return np.array(edges), np.array(pairs)

    def _make_loop(self, num: int) -> CellRelaxationLoop:
        return super()._make_loop(
            num, CellRelaxationLoop, filter=self._filter, symmetric=self._symmetric
        )

    def _padding_budget(self, num: float, sizes, edges, pairs) -> ImageBudget:
        budget = super()._padding_budget(num, sizes, edges, pairs)
        return ImageBudget(*budget, n_image=self._n_image)

    def _grow_budgets(self, budget: ImageBudget, largest: np.ndarray) -> None:
        super()._grow_budgets(budget, largest)
        if largest[2] > budget.n_image:
            self._n_image = int(np.ceil(_IMAGE_SLACK * largest[2]))
            budgets = [b._replace(n_image=self._n_image) for b in self._budgets]
            self._budgets = list(dict.fromkeys(budgets))

    def _empty_queue(self, capacity: int) -> MoleculeBatch:
        one = np.tile(np.eye(3, dtype=self._dtype), (capacity, 1, 1))
        symmetry = None
        if self._symmetric:
            symmetry = empty_symmetry((capacity,), self._size, self._dtype)
        cells = Cells(one, np.zeros_like(one), np.zeros((capacity, 3), bool), one.copy(), symmetry)
        return super()._empty_queue(capacity)._replace(cells=cells)

    def _fill_cells(self, queue: MoleculeBatch) -> None:
        for k, w in zip(range(len(queue.key)), self._waiting):
            queue.cells.reference[k], queue.cells.periodic[k] = w.cell, w.periodic
            queue.cells.mask[k] = w.mask
            if self._symmetric:
                n, symmetry = len(w.numbers), queue.cells.symmetry
                symmetry.rotations[k], symmetry.stress[k] = w.symmetry.rotations, w.symmetry.stress
                symmetry.sources[k, :, :n] = w.symmetry.sources
                symmetry.translated[k, :n] = w.symmetry.translated
