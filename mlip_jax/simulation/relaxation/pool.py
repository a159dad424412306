"""Molecules of one class of size on one device: those that wait, those in the slots, and the programs they share."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax.graphs.neighbors import count_edges
from mlip_jax.graphs.shapes import NODE_MULTIPLE, PaddingBudget, round_up
from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation.loop import (
    FREE,
    CompiledRelaxation,
    MoleculeBatch,
    Outcome,
    RelaxationLoop,
    empty_molecules,
)

_SMALLEST = 16
# Molecules that wait, for each slot; as many determine the first budget.
_AHEAD = 4
# _EDGE_SLACK: ratio of edges of a budget to those of its first molecules; edges come and go while atoms move.
_EDGE_SLACK = 1.05
# _SLACK: the same of atoms and pairs, larger so that edges fill up first.
_SLACK = 1.06
# _ONE_SLACK: the same of edges and pairs for the largest molecule, which has to fit alone.
_ONE_SLACK = 1.15
# _EDGE_MULTIPLE: edges or pairs; coarser than EDGE_MULTIPLE, since a budget serves a whole batch.
_EDGE_MULTIPLE = 128
# The last molecules get a program of this fraction of the budget, if that is worth a compilation.
_TAIL = 4
# Seconds of a call to the device, after which the host looks what has come of it.
_TURN = 1.0


class QueuedMolecule(NamedTuple):
    """A molecule on the host: number, atomic numbers (n,), positions (n, 3) in Å, mobile (n,), charge and spin."""

    number: int
    numbers: np.ndarray
    positions: np.ndarray
    mobile: np.ndarray
    charge: float
    spin: float


def slot_size(num_atoms: int) -> int:
    """Atoms of the slots that hold a molecule: 16, 32, 64, ..."""
    return max(_SMALLEST, 1 << (num_atoms - 1).bit_length())


class SlotPool:
    """See the module.

    Attributes:
      iterations: Evaluations of a batch. evaluated: Molecules in them. num_compiles: Programs.
    """

    def __init__(self, potential: Potential, params: Any, options: Mapping[str, Any], size: int, dtype,
                 batch_atoms: int, device):
        """
        Args:
          potential: The force field. params: Its parameters in `dtype`.
          options: minimizer, fmax and max_steps of `RelaxationLoop`.
          size: Atoms that a slot holds. batch_atoms: Atoms of an evaluation.
        """
        self._potential, self._params, self._options, self._device = potential, params, options, device
        self._size, self._dtype, self._batch_atoms = size, dtype, batch_atoms
        self._waiting: collections.deque[QueuedMolecule] = collections.deque()
        self._program: CompiledRelaxation | None = None
        self._state = None
        self._budgets: list[PaddingBudget] = []
        self._in_slots = 0
        self._per_iteration = 0.0
        self.iterations = self.evaluated = 0

    @property
    def num_compiles(self) -> int:
        """Programs compiled so far."""
        return self._program.num_compiles if self._program else 0

    @property
    def num_waiting(self) -> int:
        """Molecules that have no slot yet."""
        return len(self._waiting)

    @property
    def num_atoms(self) -> int:
        """Atoms of the molecules that have no slot yet."""
        return sum(len(w.numbers) for w in self._waiting)

    @property
    def num_left(self) -> int:
        """Molecules that are not done."""
        return len(self._waiting) + self._in_slots

    def is_full(self) -> bool:
        """Whether enough molecules wait."""
        slots = self._program.loop.num if self._program else self._batch_atoms // (self._size // 2) + 1
        return len(self._waiting) >= _AHEAD * slots

    def add(self, molecule: QueuedMolecule) -> None:
        """One more."""
        self._waiting.append(molecule)

    def give_all(self, other: SlotPool) -> None:
        """The molecules that wait go to another pool, whose slots hold them too."""
        other._waiting.extend(self._waiting)
        self._waiting.clear()

    def run(self, no_more: bool, most: int | None) -> tuple[list[Outcome], Outcome | None]:
        """Relax for about a second.

        Args:
          no_more: No molecule will be added: the last ones are not held up for want of others.
          most: Iterations; None: as many as that time takes.

        Returns:
          What has become of those that are done and, if `most` is given, the last evaluation of all slots; on the
          host.
        """
        with jax.enable_x64(self._dtype == np.float64):
            if self._program is None:
                self._start()
            queue = self._queue()
            waiting = int((queue.key != FREE).sum())
            budget, few = self._choose(no_more)
            compiles, begin = self.num_compiles, time.perf_counter()
            steps = most or self._turn()
            self._state, done, taken, last = self._program.run(
                budget, self._state, self._program.put(queue), waiting, steps, few)
            before = self.iterations
            count, taken, largest, self.iterations, self.evaluated = (int(x) if x.ndim == 0 else x for x in (
                jax.device_get((done.count, taken, self._state.largest, self._state.iterations,
                                self._state.evaluated))))
            if compiles == self.num_compiles and self.iterations > before:
                self._per_iteration = (time.perf_counter() - begin) / (self.iterations - before)
        for _ in range(taken):
            self._waiting.popleft()
        self._in_slots += taken - count
        self._grow_budgets(budget, largest)
        outcome = jax.device_get(done.outcome) if count else None
        left = [jax.tree.map(lambda x, k=k: x[k], outcome) for k in range(count)]
        return left, jax.device_get(last) if most else None

    def _start(self) -> None:
        """Slots and budgets, from the molecules that wait first."""
        p, sizes = self._potential, np.array([len(w.numbers) for w in self._waiting])
        edges = np.array([count_edges(w.positions, p.cutoff) for w in self._waiting])
        num = int(np.clip(np.ceil(self._batch_atoms / sizes.mean()), 1, len(sizes))) if len(sizes) else 1
        self._program = CompiledRelaxation(RelaxationLoop(
            p.model, p.energy_scale, float(p.cutoff), p.long_range_cutoff, size=self._size, num=num + (num > 1),
            dtype=self._dtype, **self._options), self._params, self._device)
        self._state = self._program.init()
        whole = self._padding_budget(num, sizes, edges)
        tail = self._padding_budget(num / _TAIL, sizes, edges)
        refilled = len(sizes) > num  # else all begin at once, and compiling takes as long as the tail would save
        self._budgets = [tail, whole] if refilled and tail.n_edge <= 0.6 * whole.n_edge else [whole]

    def _padding_budget(self, num: float, sizes, edges) -> PaddingBudget:
        most_edges = max(_EDGE_SLACK * num * edges.mean(), _ONE_SLACK * edges.max(), 2)
        nodes = max(_SLACK * num * sizes.mean(), self._size) + 1
        pairs = 0
        if self._potential.long_range_cutoff is not None:
            all_pairs = sizes * (sizes - 1) / 2
            pairs = round_up(max(_SLACK * num * all_pairs.mean(), all_pairs.max(), 1), _EDGE_MULTIPLE)
        return PaddingBudget(
            round_up(nodes, NODE_MULTIPLE), round_up(most_edges, _EDGE_MULTIPLE), self._slots + 1, pairs)

    @property
    def _slots(self) -> int:
        return self._program.loop.num

    def _choose(self, no_more: bool) -> tuple[PaddingBudget, int]:
        """The budget, and with how many molecules left to come back (`RelaxationLoop.run`)."""
        if not no_more:
            return self._budgets[-1], -1
        if len(self._budgets) == 1:
            return self._budgets[0], 0
        few = max(self._slots // _TAIL, 1)
        return (self._budgets[0], 0) if self.num_left <= few else (self._budgets[1], few)

    def _turn(self) -> int:
        if not self._per_iteration:
            return 4
        return int(np.clip(_TURN / self._per_iteration, 1, 1000))

    def _grow_budgets(self, budget: PaddingBudget, largest: np.ndarray) -> None:
        """Enlarge the budgets if a single molecule has more edges or pairs than `budget`."""
        if largest[0] <= budget.n_edge and largest[1] <= budget.n_pair:
            return
        edges = max(budget.n_edge, round_up(_ONE_SLACK * largest[0], _EDGE_MULTIPLE))
        pairs = max(budget.n_pair, round_up(_ONE_SLACK * largest[1], _EDGE_MULTIPLE) if largest[1] else 0)
        self._budgets = [b._replace(n_edge=max(b.n_edge, edges), n_pair=max(b.n_pair, pairs)) for b in self._budgets]
        self._budgets = list(dict.fromkeys(self._budgets))

    def _queue(self) -> MoleculeBatch:
        """The first of the waiting molecules, padded to a fixed number."""
        capacity = _AHEAD * self._slots
        queue = empty_molecules(capacity, self._size, self._dtype)
        for place, w in zip(range(capacity), self._waiting):
            n = len(w.numbers)
            queue.key[place], queue.slots.count[place] = w.number, n
            queue.slots.charge[place], queue.slots.spin[place] = w.charge, w.spin
            queue.slots.numbers[place, :n], queue.positions[place, :n] = w.numbers, w.positions
            queue.mobile[place, :n] = w.mobile
        return queue
