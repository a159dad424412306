"""Loop of the batched relaxation: one compiled program that fills, relaxes and empties slots. Pure.

    M   slots, which hold the molecules of a batch       n   atoms per slot
    Q   molecules in the queue

An iteration has these steps, none of which involves the host:

1. fill free slots from the queue (`_fill_free_slots`);
2. build the neighbor lists and evaluate the force field on all slots that fit the padding budget
   (`RelaxationLoop._evaluate`);
3. classify each molecule as running, converged, at its step limit or diverged
   (`RelaxationLoop._classify`);
4. move the running molecules by one step of the minimizer (`RelaxationLoop._advance`);
5. copy finished molecules to the outcomes and free their slots (`_release_finished`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlip_jax.graphs import slots as slot_graphs
from mlip_jax.graphs.neighbor_slots import add_neighbor_slots, choose_capacity
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.graphs.slots import Slots
from mlip_jax.potential import evaluate
from mlip_jax.simulation.relaxation.minimizers import Minimizer
from mlip_jax.simulation.relaxation.state import (
    FREE,
    FinishedMolecules,
    MoleculeBatch,
    Outcome,
    RelaxationState,
    empty_outcome,
)
from mlip_jax.simulation.relaxation.status import RUNNING, RelaxationStatus

# SHORTEST: distance (Å) below which two atoms overlap; the shortest bond, that of H2, is 0.74 Å.
SHORTEST = 0.4


@dataclasses.dataclass(frozen=True)
class RelaxationLoop:
    """Configuration of the compiled program; everything here is static.

    Attributes:
      model: Model with the interface of mlip_jax.models.
      energy_scale: Energy per unit of the model's output (eV).
      cutoff: Cutoff radius (Å).
      long_range_cutoff: Cutoff radius of the long-range pairs (Å), or None. That of periodic
        structures is given by `graphs.long_range.in_cells`.
      minimizer: Minimizer, see minimizers/.
      fmax: Largest force of a converged molecule (eV/Å).
      max_steps: Maximum number of steps per molecule.
      size: Atoms per slot (n).
      num: Number of slots (M).
      dtype: Dtype of positions, forces and minimizer state.
    """

    model: nn.Module
    energy_scale: float
    cutoff: float
    long_range_cutoff: float | None
    minimizer: Minimizer
    fmax: float
    max_steps: int
    size: int
    num: int
    dtype: Any

    @property
    def num_rows(self) -> int:
        """Return the number of vectors per slot that the minimizer moves."""
        return self.size

    def init(self) -> RelaxationState:
        """Return the state without any molecule."""
        num, size = self.num, self.size
        zeros = jnp.zeros(num, self.dtype)
        now = MoleculeBatch(
            jnp.full(num, FREE, jnp.int32),
            Slots(jnp.zeros((num, size), jnp.int32), jnp.zeros(num, jnp.int32), zeros, zeros),
            jnp.zeros((num, size, 3), self.dtype),
            jnp.zeros((num, size), bool),
        )
        return RelaxationState(
            now,
            jnp.zeros(num, jnp.int32),
            zeros,
            zeros,
            jnp.zeros(num, bool),
            self.minimizer.init(num, 3 * self.num_rows, self.dtype),
            jnp.zeros(2, jnp.int32),
            jnp.int32(0),
            jnp.int32(0),
        )

    def run(
        self,
        budget: PaddingBudget,
        capacity: int,
        params,
        state: RelaxationState,
        queue: MoleculeBatch,
        *,
        queue_length: jax.Array,
        max_iterations: jax.Array,
        min_active: jax.Array,
    ) -> tuple[RelaxationState, FinishedMolecules, jax.Array, Outcome]:
        """Iterate until all molecules are done or the host has to step in.

        Args:
          budget: Padding budget of the graph. Static.
          capacity: Capacity of the queue (Q). Static.
          params: Parameters of the model.
          state: State to continue from.
          queue: Queue; only its first `queue_length` entries are molecules.
          queue_length: Number of molecules in the queue.
          max_iterations: Maximum number of iterations.
          min_active: Stop when the queue is empty and at most `min_active` molecules are left.

        Returns:
          The state, the finished molecules, the number of molecules taken from the queue, and the
          last evaluation of all slots.
        """
        done = FinishedMolecules(self._empty_outcome(capacity + self.num), jnp.int32(0))
        last = self._empty_outcome(self.num)
        start = state.iterations

        def should_continue(carry):
            state, _, taken, _ = carry
            num_active = (state.now.key != FREE).sum()
            starved = (taken >= queue_length) & (num_active <= min_active)
            fits = self.fits(budget, state.largest)
            return ~starved & fits & (state.iterations - start < max_iterations)

        def iterate(carry):
            state, done, taken, _ = carry
            state, taken = _fill_free_slots(state, queue, queue_length, taken)
            state, outcome = self._advance(budget, params, state)
            done, now = _release_finished(done, state.now, outcome)
            return state._replace(now=now), done, taken, outcome

        return jax.lax.while_loop(should_continue, iterate, (state, done, jnp.int32(0), last))

    def _empty_outcome(self, num: int) -> Outcome:
        return empty_outcome(num, self.size, self.dtype)

    def fits(self, budget, largest):
        """Return whether the largest slots fit into the budget, () bool."""
        return (largest[0] <= budget.n_edge) & (largest[1] <= budget.n_pair)

    def _advance(self, budget, params, state) -> tuple[RelaxationState, Outcome]:
        """Evaluate all slots and move the molecules that are not done by one step."""
        now, evaluated = state.now, self._evaluate(budget, params, state)
        first = evaluated.takes_part & (state.moved == 0)
        energy_start = jnp.where(first, evaluated.energy, state.energy_start)
        fmax_start = jnp.where(first, evaluated.fmax, state.fmax_start)
        initially_bound = jnp.where(
            first, evaluated.max_nearest_distance < self.cutoff, state.initially_bound
        )
        code = self._classify(evaluated, state.moved, initially_bound)
        outcome = Outcome(
            now.key,
            code,
            state.moved,
            now.positions,
            evaluated.forces,
            evaluated.energy,
            evaluated.fmax,
            energy_start,
            fmax_start,
            evaluated.nearest,
            evaluated.takes_part,
        )
        moves = evaluated.takes_part & (code == RUNNING)
        moved, minimizer = self._move(state, evaluated, moves)
        return RelaxationState(
            moved,
            state.moved + moves,
            energy_start,
            fmax_start,
            initially_bound,
            minimizer,
            evaluated.largest,
            state.iterations + 1,
            state.evaluated + evaluated.takes_part.sum(dtype=jnp.int32),
        ), self._complete(outcome, evaluated)

    def _complete(self, outcome: Outcome, evaluated) -> Outcome:
        """Return the outcome with the fields that only some loops have."""
        return outcome

    def _move(self, state, evaluated, moves) -> tuple[MoleculeBatch, Any]:
        """Return the molecules after a step of the slots `moves`, and the minimizer's state."""
        now = state.now
        # The minimizers work on (M, 3 n). Fixed atoms have no force, so no minimizer moves them.
        forces = jnp.where(now.mobile[:, :, None], evaluated.forces, 0.0)
        positions, minimizer = self._step(state, now.positions, forces, moves)
        return now._replace(positions=positions), minimizer

    def _step(self, state, rows, forces, moves):
        """Take a step of the minimizer along vectors (M, rows, 3)."""
        flat = (self.num, 3 * self.num_rows)
        moved, minimizer = self.minimizer.step(
            state.minimizer, rows.reshape(flat), forces.reshape(flat), state.moved == 0, moves
        )
        return moved.reshape(rows.shape), minimizer

    def _evaluate(self, budget, params, state) -> _SlotEvaluation:
        """Evaluate the force field on all slots that fit the padding budget."""
        now = state.now
        batch = slot_graphs.build(
            now.slots, now.positions, budget, self.cutoff, self.long_range_cutoff
        )
        # no atom has more neighbors than its slot has other atoms
        capacity = choose_capacity(self.model, self.size - 1, budget.n_edge / budget.n_node)
        graph = add_neighbor_slots(batch.graph, capacity)
        out = evaluate(self.model, params, graph, self.energy_scale)
        # (nodes, 3) -> (M, n, 3)
        forces = slot_graphs.to_slots(batch, out.forces, self.size)
        norms = jnp.where(now.mobile, jnp.sqrt((forces * forces).sum(-1)), 0.0)
        return _SlotEvaluation(
            batch.takes_part,
            out.energy[:-1],
            forces,
            norms.max(1),
            batch.nearest,
            batch.max_nearest_distance,
            jnp.stack([batch.n_edge.max(), batch.n_pair.max()]).astype(jnp.int32),
        )

    def _classify(self, evaluated, steps, initially_bound):
        """Return the status code of each slot, (M,); RUNNING if it was not evaluated."""
        finite = jnp.isfinite(evaluated.energy) & jnp.isfinite(evaluated.forces).all((1, 2))
        codes = (
            (~finite, RelaxationStatus.NOT_FINITE),
            (evaluated.nearest < SHORTEST, RelaxationStatus.ATOMS_OVERLAP),
            (
                initially_bound & (evaluated.max_nearest_distance >= self.cutoff),
                RelaxationStatus.DISSOCIATED,
            ),
            (evaluated.fmax < self.fmax, RelaxationStatus.CONVERGED),
            (steps >= self.max_steps, RelaxationStatus.STEP_LIMIT),
        )
        code = jnp.full(self.num, RUNNING, jnp.int32)
        # the first condition that holds determines the code
        for holds, status in reversed(codes):
            code = jnp.where(holds, int(status), code)
        return jnp.where(evaluated.takes_part, code, RUNNING)


class _SlotEvaluation(NamedTuple):
    """Evaluation of all slots.

    Attributes:
      takes_part: Whether the slot fitted into the padding budget, (M,) bool.
      energy: Energy minus the reference energies (eV), (M,).
      forces: Forces (eV/Å), (M, n, 3).
      fmax: Largest norm of the force on a mobile atom (eV/Å), (M,).
      nearest: Distance of the closest two atoms (Å), (M,).
      max_nearest_distance: Largest distance of an atom to its nearest neighbor (Å), (M,).
      largest: Edges and pairs of the largest slots, (2,) int32.
    """

    takes_part: jax.Array
    energy: jax.Array
    forces: jax.Array
    fmax: jax.Array
    nearest: jax.Array
    max_nearest_distance: jax.Array
    largest: jax.Array


def _fill_free_slots(
    state: RelaxationState, queue: MoleculeBatch, queue_length, taken
) -> tuple[RelaxationState, jax.Array]:
    """Fill free slots with the next molecules of the queue."""
    free = state.now.key == FREE
    # index in the queue of the molecule for each free slot, (M,)
    index = taken + jnp.cumsum(free) - 1
    new = free & (index < queue_length)
    index = jnp.clip(index, 0, queue.key.shape[0] - 1)

    def fill():
        now = jax.tree.map(
            lambda q, x: jnp.where(new.reshape(-1, *[1] * (x.ndim - 1)), q[index], x),
            queue,
            state.now,
        )
        return state._replace(now=now, moved=jnp.where(new, 0, state.moved))

    return jax.lax.cond(new.any(), fill, lambda: state), taken + new.sum(dtype=jnp.int32)


def _release_finished(
    done: FinishedMolecules, now: MoleculeBatch, outcome: Outcome
) -> tuple[FinishedMolecules, MoleculeBatch]:
    """Append finished molecules to the outcomes and free their slots."""
    finished = (outcome.code != RUNNING) & (now.key != FREE)

    def write():
        # an index beyond the end drops the slots that are not finished
        index = jnp.where(
            finished, done.count + jnp.cumsum(finished) - 1, done.outcome.key.shape[0]
        )
        kept = jax.tree.map(
            lambda into, x: into.at[index].set(x, mode="drop"), done.outcome, outcome
        )
        slots = now.slots._replace(count=jnp.where(finished, 0, now.slots.count))
        count = done.count + finished.sum(dtype=jnp.int32)
        return FinishedMolecules(kept, count), now._replace(
            key=jnp.where(finished, FREE, now.key), slots=slots
        )

    return jax.lax.cond(finished.any(), write, lambda: (done, now))
