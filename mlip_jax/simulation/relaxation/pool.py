"""Molecules of one size class on one device: the queue, the slots and their compiled programs."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax.graphs.neighbors import count_edges
from mlip_jax.graphs.shapes import NODE_MULTIPLE, PaddingBudget, round_up
from mlip_jax.potential import Potential
from mlip_jax.simulation.device_memory import ProgramTooLarge, largest_size, predict_bytes
from mlip_jax.simulation.relaxation.compiled import CompiledRelaxation
from mlip_jax.simulation.relaxation.loop import RelaxationLoop
from mlip_jax.simulation.relaxation.state import (
    FREE,
    MoleculeBatch,
    Outcome,
    Symmetry,
    empty_molecules,
)
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

# _SMALLEST: atoms of the smallest slots.
_SMALLEST = 16
# _QUEUED_PER_SLOT: waiting molecules per slot; the same molecules determine the first budget.
_QUEUED_PER_SLOT = 4
# _EDGE_SLACK: edges of a budget over those of its first molecules; the number changes as atoms
# move.
_EDGE_SLACK = 1.05
# _SLACK: the same for atoms and pairs, larger so that edges fill up first.
_SLACK = 1.06
# _ONE_SLACK: the same for edges and pairs of the largest molecule, which must fit.
_ONE_SLACK = 1.15
# _EDGE_MULTIPLE: multiple for edges and pairs, coarser than EDGE_MULTIPLE since a budget serves a
# whole batch.
_EDGE_MULTIPLE = 128
# _TAIL: inverse fraction of the budget for the last molecules, if that is worth a compilation.
_TAIL = 4
# _DISPATCH_SECONDS: duration of a dispatch in seconds, after which the host reads the results.
_DISPATCH_SECONDS = 1.0


class QueuedMolecule(NamedTuple):
    """Molecule that waits on the host.

    Attributes:
      number: Number of the molecule.
      numbers: Atomic numbers, (n,).
      positions: Positions (Å), (n, 3).
      mobile: Whether an atom may move, (n,) bool.
      charge: Total charge (e).
      spin: Number of unpaired electrons.
      cell: Lattice vectors of a periodic structure (Å), (3, 3), otherwise None; see `Cells`.
      periodic: Periodicity along each lattice vector, (3,) bool, or None.
      mask: Components of the strain that relax, (3, 3), or None.
      symmetry: Operations of the space group that is kept, or None.
    """

    number: int
    numbers: np.ndarray
    positions: np.ndarray
    mobile: np.ndarray
    charge: float
    spin: float
    cell: np.ndarray | None = None
    periodic: np.ndarray | None = None
    mask: np.ndarray | None = None
    symmetry: Symmetry | None = None


def slot_size(num_atoms: int, smallest: int = _SMALLEST) -> int:
    """Return the number of atoms of the slots for a molecule: 16, 32, 64, ..."""
    return max(smallest, 1 << (num_atoms - 1).bit_length())


class SlotPool:
    """Molecules of one size class on one device, with the program that relaxes them.

    Attributes:
      iterations: Number of evaluations of a batch.
      evaluated: Number of molecules in these evaluations.
      num_compiles: Number of compiled programs used so far.
      program: Compiled program, or None before the first molecule.
      predicted_bytes: Memory of the program according to larger ones that did not fit, or None.
    """

    def __init__(
        self,
        potential: Potential,
        params: Any,
        options: Mapping[str, Any],
        *,
        size: int,
        dtype,
        batch_atoms: int,
        device,
    ):
        """Create an empty pool.

        Args:
          potential: The force field.
          params: Parameters of the force field in `dtype`.
          options: minimizer, fmax and max_steps of `RelaxationLoop`.
          size: Atoms per slot.
          dtype: Dtype of the relaxation.
          batch_atoms: Atoms per evaluation.
          device: Device that runs the program.
        """
        self._potential, self._params = potential, params
        self._options, self._device = options, device
        self._size, self._dtype, self._batch_atoms = size, dtype, batch_atoms
        self._waiting: collections.deque[QueuedMolecule] = collections.deque()
        self.program: CompiledRelaxation | None = None
        self._state = None
        self._budgets: list[PaddingBudget] = []
        self._in_slots: dict[int, QueuedMolecule] = {}
        self._max_slots: int | None = None
        self._too_large: list[tuple[float, int]] = []  # slots and bytes of programs
        self.predicted_bytes: float | None = None
        self._earlier_compiles = 0
        self._per_iteration = 0.0
        self._before = np.zeros(2, int)  # counters of programs that ran out of memory
        self.iterations = self.evaluated = 0

    @property
    def num_compiles(self) -> int:
        """Return the number of programs used so far."""
        return self._earlier_compiles + (self.program.num_compiles if self.program else 0)

    @property
    def num_waiting(self) -> int:
        """Return the number of molecules without a slot."""
        return len(self._waiting)

    @property
    def num_atoms(self) -> int:
        """Return the number of atoms of the molecules without a slot."""
        return sum(len(w.numbers) for w in self._waiting)

    @property
    def num_left(self) -> int:
        """Return the number of molecules that are not done."""
        return len(self._waiting) + len(self._in_slots)

    def is_full(self) -> bool:
        """Return whether enough molecules wait."""
        slots = (
            self.program.loop.num if self.program else self._batch_atoms // (self._size // 2) + 1
        )
        return len(self._waiting) >= _QUEUED_PER_SLOT * slots

    def add(self, molecule: QueuedMolecule) -> None:
        """Append a molecule to the waiting ones."""
        self._waiting.append(molecule)

    def move_queue_to(self, other: SlotPool) -> None:
        """Move the waiting molecules to another pool, whose slots must be at least as large."""
        other._waiting.extend(self._waiting)
        self._waiting.clear()

    def run(
        self, input_ended: bool, max_iterations: int | None
    ) -> tuple[list[Outcome], Outcome | None]:
        """Relax for about a second.

        Args:
          input_ended: Whether no further molecules will be added. If so, the last molecules do not
            wait for others.
          max_iterations: Maximum number of iterations; None: as many as fit into a second.

        Returns:
          The outcomes of the finished molecules and, if `max_iterations` is given, the last
          evaluation of all slots, otherwise None; on the host.
        """
        with jax.enable_x64(self._dtype == np.float64):
            if self.program is None:
                self._prepare()
            queue = self._queue()
            budget, min_active = self._choose_budget(input_ended)
            compiles, begin = self.num_compiles, time.perf_counter()
            self._state, done, taken, last = self.program.run(
                budget,
                self._state,
                self.program.put(queue),
                queue_length=int((queue.key != FREE).sum()),
                max_iterations=max_iterations or self._iterations_per_dispatch(),
                min_active=min_active,
            )
            before = self.iterations - self._before[0]
            count, taken, largest, iterations, evaluated = (
                int(x) if x.ndim == 0 else x
                for x in (
                    jax.device_get(
                        (
                            done.count,
                            taken,
                            self._state.largest,
                            self._state.iterations,
                            self._state.evaluated,
                        )
                    )
                )
            )
            if compiles == self.num_compiles and iterations > before:
                self._per_iteration = (time.perf_counter() - begin) / (iterations - before)
        self.iterations, self.evaluated = (self._before + [iterations, evaluated]).tolist()
        for _ in range(taken):
            molecule = self._waiting.popleft()
            self._in_slots[molecule.number] = molecule
        self._grow_budgets(budget, largest)
        outcome = jax.device_get(done.outcome) if count else None
        finished = [jax.tree.map(lambda x, k=k: x[k], outcome) for k in range(count)]
        for molecule in finished:
            del self._in_slots[int(molecule.key)]
        return finished, jax.device_get(last) if max_iterations else None

    def shrink(self, error: ProgramTooLarge | Exception) -> list[int]:
        """Reduce the number of slots for the memory of the device.

        It is halved after the device ran out of memory. If the compiler has reported the memory of
        a program, the largest number that fits is predicted. The molecules in slots start again:
        their state was on the device. The number stays reduced: a larger one would cost a
        compilation, and all molecules in slots their steps if it failed again.

        Args:
          error: Error of the device, raised again if there is only one slot; or ProgramTooLarge.

        Returns:
          Numbers of the molecules that start again.
        """
        slots = self._slots
        if slots < 2:
            raise error
        if isinstance(error, ProgramTooLarge):
            self._too_large.append((slots, error.needed))
            self._max_slots = int(largest_size(self._too_large, error.available))
            self.predicted_bytes = predict_bytes(self._too_large, self._max_slots)
            reason = str(error)
        else:
            self._max_slots, reason = slots // 2, "out of memory on the device"
        log.warning(
            "%s with %s in parallel; continuing with %d until the end",
            reason,
            count_of(slots, "molecule"),
            self._max_slots,
        )
        self._earlier_compiles, self._before = (
            self.num_compiles,
            np.array([self.iterations, self.evaluated]),
        )
        self.program, self._state, self._per_iteration = None, None, 0.0
        restarted, self._in_slots = self._in_slots, {}
        self._waiting.extendleft(reversed(restarted.values()))
        return list(restarted)

    def _prepare(self) -> None:
        """Choose the number of slots and the budgets for the waiting molecules."""
        sizes = np.array([len(w.numbers) for w in self._waiting])
        edges, pairs = self._count_pairs(sizes)
        num = self._num_slots(sizes)
        slots = num + (num > 1)
        if self._max_slots is not None:
            num = slots = min(num, self._max_slots)
        self.program = CompiledRelaxation(self._make_loop(slots), self._params, self._device)
        self._state = self.program.init()
        whole = self._padding_budget(num, sizes, edges, pairs)
        tail = self._padding_budget(num / _TAIL, sizes, edges, pairs)
        # without refills all molecules start at once, and compiling takes as long as the tail saves
        refilled = len(sizes) > num
        self._budgets = [tail, whole] if refilled and tail.n_edge <= 0.6 * whole.n_edge else [whole]

    def _num_slots(self, sizes) -> int:
        """Return the number of slots whose molecules are evaluated together."""
        if not len(sizes):
            return 1
        return int(np.clip(np.ceil(self._batch_atoms / sizes.mean()), 1, len(sizes)))

    def _count_pairs(self, sizes) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of edges and of long-range pairs of the waiting molecules."""
        edges = [count_edges(w.positions, self._potential.cutoff) for w in self._waiting]
        return np.array(edges), sizes * (sizes - 1) / 2

    def _make_loop(self, num: int, kind=RelaxationLoop, **options) -> RelaxationLoop:
        """Return the program of `num` slots."""
        p = self._potential
        return kind(
            p.model,
            p.energy_scale,
            float(p.cutoff),
            p.long_range_cutoff,
            size=self._size,
            num=num,
            dtype=self._dtype,
            **self._options,
            **options,
        )

    def _padding_budget(self, num: float, sizes, edges, all_pairs) -> PaddingBudget:
        """Return the padding budget of `num` average molecules; the largest one fits, too."""
        max_edges = max(_EDGE_SLACK * num * edges.mean(), _ONE_SLACK * edges.max(), 2)
        nodes = max(_SLACK * num * sizes.mean(), self._size) + 1
        pairs = 0
        if self._potential.long_range_cutoff is not None:
            pairs = round_up(
                max(_SLACK * num * all_pairs.mean(), all_pairs.max(), 1), _EDGE_MULTIPLE
            )
        return PaddingBudget(
            round_up(nodes, NODE_MULTIPLE),
            round_up(max_edges, _EDGE_MULTIPLE),
            self._slots + 1,
            pairs,
        )

    @property
    def _slots(self) -> int:
        """Return the number of slots."""
        return self.program.loop.num

    def _choose_budget(self, input_ended: bool) -> tuple[PaddingBudget, int]:
        """Return the padding budget and the argument `min_active` of `RelaxationLoop.run`."""
        if not input_ended:
            return self._budgets[-1], self._slots - 1  # stop when a slot is free
        if len(self._budgets) == 1:
            return self._budgets[0], 0
        tail = max(self._slots // _TAIL, 1)
        return (self._budgets[0], 0) if self.num_left <= tail else (self._budgets[1], tail)

    def _iterations_per_dispatch(self) -> int:
        """Return the number of iterations of a dispatch of about a second."""
        if not self._per_iteration:
            return 4
        return int(np.clip(_DISPATCH_SECONDS / self._per_iteration, 1, 1000))

    def _grow_budgets(self, budget: PaddingBudget, largest: np.ndarray) -> None:
        """Enlarge the budgets if a single molecule has more edges or pairs than `budget`."""
        if self.program.loop.fits(budget, largest):
            return
        edges = max(budget.n_edge, round_up(_ONE_SLACK * largest[0], _EDGE_MULTIPLE))
        pairs = max(
            budget.n_pair, round_up(_ONE_SLACK * largest[1], _EDGE_MULTIPLE) if largest[1] else 0
        )
        self._budgets = [
            b._replace(n_edge=max(b.n_edge, edges), n_pair=max(b.n_pair, pairs))
            for b in self._budgets
        ]
        self._budgets = list(dict.fromkeys(self._budgets))

    def _queue(self) -> MoleculeBatch:
        """Return the first waiting molecules, padded to a fixed number."""
        capacity = _QUEUED_PER_SLOT * self._slots
        queue = self._empty_queue(capacity)
        for k, w in zip(range(capacity), self._waiting):
            n = len(w.numbers)
            queue.key[k], queue.slots.count[k] = w.number, n
            queue.slots.charge[k], queue.slots.spin[k] = w.charge, w.spin
            queue.slots.numbers[k, :n], queue.positions[k, :n] = w.numbers, w.positions
            queue.mobile[k, :n] = w.mobile
        self._fill_cells(queue)
        return queue

    def _empty_queue(self, capacity: int) -> MoleculeBatch:
        return empty_molecules(capacity, self._size, self._dtype)

    def _fill_cells(self, queue: MoleculeBatch) -> None:
        """Write the cells of the first waiting structures; molecules have none."""
