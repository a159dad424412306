"""Loop of batched molecular dynamics: one compiled program with many steps of many molecules. Pure.

    M   molecules       N   atoms of all molecules, including padding

An iteration of the loop has these steps:

1. rebuild the neighbor list if the next step needs another one (`DynamicsLoop._update_list`);
2. with this list, repeat the inner steps (`DynamicsLoop._repeat_steps`):

   - evaluate the forces and apply the second half of the kick (`DynamicsLoop._finish_step`);
   - mark molecules whose bonds broke or that are too hot (`breakage.mark_broken`);
   - apply the first half of the next kick and the drift (`DynamicsLoop._begin_step`);
   - leave the repetition if the step is to be recorded or the next one needs another list;

3. record energies and frames if they are due (`DynamicsRecorder.append`);
4. return to the host if the dispatch is complete, no molecule is left, or the host has to step in.

If a step needs a larger neighbor capacity, or a list that only the host can build, the step is not
made: the state remains unchanged and the loop returns to the host. A molecule that breaks is marked
and frozen from then on; the other molecules are not affected.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import sum_by_graph
from mlip_jax.graphs.neighbor_slots import uses_all_pairs
from mlip_jax.potential import evaluate
from mlip_jax.simulation.dynamics import neighbors
from mlip_jax.simulation.dynamics.device import state as md_state
from mlip_jax.simulation.dynamics.device.breakage import mark_broken, mark_far_moves
from mlip_jax.simulation.dynamics.device.cutoff_filter import edges_within_cutoff
from mlip_jax.simulation.dynamics.device.molecule_masks import (
    any_of_molecule,
    select,
    where_running,
)
from mlip_jax.simulation.dynamics.device.records import DynamicsRecorder, Records
from mlip_jax.simulation.dynamics.device.state import NEW, RUNNING, DynamicsState, HalfStep
from mlip_jax.simulation.dynamics.integrators import Motion, Verlet
from mlip_jax.simulation.dynamics.neighbors import Cutoffs, NeighborCapacity
from mlip_jax.simulation.dynamics.system import Particles


class StepInputs(NamedTuple):
    """Arrays that are constant during a dispatch.

    Attributes:
      params: Parameters of the model.
      particles: Atoms.
      key: Random key of the run; each step folds its number into it.
      timestep: Time step in ASE's unit of time.
    """

    params: Any
    particles: Particles
    key: jax.Array
    timestep: jax.Array


@dataclasses.dataclass(frozen=True)
class DynamicsLoop:
    """Configuration of the compiled program; everything here is static.

    Attributes:
      model: Model with the interface of mlip_jax.models.
      energy_scale: Energy per unit of the model's output (eV).
      cutoffs: Cutoffs of the neighbor lists.
      integrator: Integrator, see integrators.py.
      lists_on_device: Whether the device builds the neighbor lists.
      max_displacement: Maximum displacement of an atom in one step (Å); a longer one breaks the
        molecule.
      bond_range: Range of the bond length over the sum of the covalent radii; outside it a bond is
        broken.
      recorder: Recording of rows and frames.
    """

    model: nn.Module
    energy_scale: float
    cutoffs: Cutoffs
    integrator: Verlet
    lists_on_device: bool
    max_displacement: float
    bond_range: tuple[float, float]
    recorder: DynamicsRecorder

    def run(
        self, capacity: NeighborCapacity, inputs: StepInputs, state: DynamicsState, until: jax.Array
    ) -> tuple[DynamicsState, Records]:
        """Make steps until the dispatch is complete or the host has to step in.

        The dispatch is complete if `until` is reached, records or frames are full, or no molecule
        is running.

        Args:
          capacity: Shapes of the list and of the edges that the model receives. Static.
          inputs: Parameters, atoms, random key and time step.
          state: State to continue from.
          until: Step to stop at.

        Returns:
          The state and the records of the dispatch.
        """
        particles, timestep = inputs.particles, inputs.timestep
        records = self.recorder.empty(state)

        def should_continue(carry):
            state, _, records = carry
            return (
                (state.step < until)
                & ~self.recorder.is_full(records)
                & ~state.stale
                & capacity.holds(state.wanted)
                & (state.code == RUNNING).any()
            )

        def iterate(carry):
            state, pending, records = carry
            state, ready = self._update_list(capacity, particles, state, pending)
            state, pending, due = self._repeat_steps(inputs, capacity, state, pending, ready, until)
            return state, pending, self.recorder.append(records, particles, timestep, state, due)

        no = jnp.asarray(False)
        narrow = no if self._can_be_narrow(state.cell) else None
        no_step = HalfStep(_motion(state), state.code, jnp.asarray(True), no, narrow)
        state, _, records = jax.lax.while_loop(should_continue, iterate, (state, no_step, records))
        return state, records

    def _update_list(
        self, capacity, particles, state: DynamicsState, pending: HalfStep
    ) -> tuple[DynamicsState, jax.Array]:
        """Return the state with the list for the pending step, and whether the step is possible.

        If it is not, `wanted` or `stale` of the state indicates what the host has to do.
        """
        if not self.lists_on_device:
            return state._replace(stale=pending.moved), ~pending.moved
        graph, wanted = jax.lax.cond(
            pending.moved,
            lambda: neighbors.on_device(
                particles,
                pending.motion.positions,
                pending.motion.cell,
                capacity.budget,
                self.cutoffs,
            ),
            lambda: (state.graph, state.wanted[:2]),
        )
        wanted = jnp.append(wanted, 0)
        ready = capacity.holds(wanted) & ~pending.is_narrow()
        updated = state._replace(graph=graph, lists=state.lists + (pending.moved & ready))
        state = jax.lax.cond(ready, lambda: updated, lambda: state)
        return state._replace(wanted=wanted, stale=pending.is_narrow()), ready

    def _repeat_steps(
        self,
        inputs: StepInputs,
        capacity: NeighborCapacity,
        state: DynamicsState,
        pending: HalfStep,
        ready: jax.Array,
        until: jax.Array,
    ) -> tuple[DynamicsState, HalfStep, jax.Array]:
        """Make steps with one list.

        Stop after a step that is to be recorded, before a step that needs another list, and at the
        end of the dispatch. Quantities that depend only on the list are computed once.

        Returns:
          The state, the pending half step, and whether the last step is to be recorded.
        """
        graph = state.graph
        without_graph = state._replace(graph=None)

        def should_continue(carry):
            state, pending, due = carry
            return (
                ready
                & ~pending.moved
                & ~pending.is_narrow()
                & ~due
                & capacity.holds(state.wanted)
                & (state.step < until)
                & (state.code == RUNNING).any()
            )

        def iterate(carry):
            state, pending, _ = carry
            # There is nothing to finish at the start of a dispatch. The program contains the first
            # half of a step only once, so results do not depend on where a dispatch starts. The
            # state is selected, not computed in a branch: a device would wait for the host there.
            finished = self._finish_step(inputs, capacity, state, graph, pending)
            wanted = jnp.where(pending.empty, state.wanted, finished.wanted)
            # a step with too many edges within the cutoff is undone, except for the number of edges
            done = capacity.holds(wanted) & ~pending.empty
            new = jax.tree.map(lambda a, b: jnp.where(done, b, a), state, finished)
            new = new._replace(wanted=wanted)
            due = self.recorder.is_due(new.step) & done
            return new, self._begin_step(inputs, new, graph), due

        state, pending, due = jax.lax.while_loop(
            should_continue,
            iterate,
            (without_graph, pending._replace(moved=jnp.asarray(False)), jnp.asarray(False)),
        )
        return state._replace(graph=graph), pending, due

    @staticmethod
    def _time(inputs: StepInputs, state: DynamicsState) -> tuple[jax.Array, jax.Array]:
        """Return the length of the next step and its random key.

        The length is zero for the step that only evaluates the initial forces.
        """
        dt = jnp.where(state.step == NEW, 0.0, inputs.timestep).astype(state.positions.dtype)
        return dt, jax.random.fold_in(inputs.key, state.step)

    def _begin_step(self, inputs: StepInputs, state: DynamicsState, graph) -> HalfStep:
        """Make the first half of the next step, up to the evaluation of the forces."""
        particles = inputs.particles
        dt, key = self._time(inputs, state)
        start = _motion(state)
        motion = self.integrator.begin(start, state.forces, state.virial, particles, dt, key)
        code = mark_far_moves(particles, state, motion, self.max_displacement)
        motion = where_running(code, particles, motion, start)
        moved = neighbors.has_moved(graph, particles, motion.positions, motion.cell, self.cutoffs)
        narrow = None
        if self._can_be_narrow(motion.cell):
            narrow = ~self._is_wide(particles, motion)
        return HalfStep(motion, code, jnp.asarray(False), moved, narrow)

    def _can_be_narrow(self, cell: jax.Array | None) -> bool:
        """Return whether the device makes lists of a cell, which may shrink."""
        return self.lists_on_device and cell is not None

    def _is_wide(self, particles: Particles, motion: Motion) -> jax.Array:
        """Return whether the cell is large enough for lists of nearest images, () bool.

        A cell that shrinks may become too small.
        """
        planes = 1 / jnp.linalg.norm(jnp.linalg.inv(motion.cell), axis=-2)
        return (
            jnp.where(particles.periodic, planes, jnp.inf) > 2 * neighbors.list_radius(self.cutoffs)
        ).all()

    def _finish_step(
        self,
        inputs: StepInputs,
        capacity: NeighborCapacity,
        state: DynamicsState,
        graph: jraph.GraphsTuple,
        pending: HalfStep,
    ) -> DynamicsState:
        """Make the second half of a step with the forces at the new positions."""
        particles, motion, code = inputs.particles, pending.motion, pending.code
        dt, key = self._time(inputs, state)
        graph_globals = (
            graph.globals
            if motion.cell is None
            else graph.globals | {"cell": graph.globals["cell"].at[:-1].set(motion.cell)}
        )
        graph = graph._replace(
            nodes=graph.nodes | {"positions": motion.positions}, globals=graph_globals
        )
        graph, wanted = self._filter_edges(capacity, state, graph)
        out = evaluate(
            self.model, inputs.params, graph, self.energy_scale, self.integrator.needs_stress
        )
        # (M, 3, 3) -> (M,), without the padding graph
        virial = (
            jnp.trace(out.stress[:-1], axis1=1, axis2=2)
            if self.integrator.needs_stress
            else state.virial
        )
        # Initial energies are subtracted per atom: sums of differences keep digits that sums of
        # energies lose.
        energies = jnp.where(state.step == NEW, out.energies, state.energies)
        num = state.code.shape[0]
        energy = sum_by_graph(out.energies - energies, particles.molecule, num)
        ended = self.integrator.end(motion, out.forces, particles, dt, key)
        finite = jnp.isfinite(energy) & ~any_of_molecule(
            ~jnp.isfinite(out.forces).all(-1) | ~jnp.isfinite(ended.velocities).all(-1), particles
        )
        code = jnp.where((code == RUNNING) & ~finite, md_state.NOT_FINITE, code)
        was_running = code == RUNNING  # a molecule that breaks below keeps the state of its break
        code, culprit = mark_broken(particles, state, ended, code, self.bond_range)
        heat, heat_low = _add_compensated(state.heat, state.heat_low, ended.heat)
        step = state.step + 1
        new = dict(
            positions=ended.positions,
            low=ended.low,
            velocities=ended.velocities,
            forces=out.forces,
            virial=virial,
            cell=ended.cell,
            energy=energy,
            heat=heat,
            heat_low=heat_low,
        )
        kept = {
            name: select(was_running, particles, value, getattr(state, name))
            for name, value in new.items()
        }
        return state._replace(
            **kept,
            step=step,
            energies=energies,
            code=code,
            culprit=culprit,
            wanted=wanted,
            broken_at=jnp.where((state.code == RUNNING) & (code != RUNNING), step, state.broken_at),
        )

    def _filter_edges(
        self, capacity: NeighborCapacity, state: DynamicsState, graph: jraph.GraphsTuple
    ) -> tuple[jraph.GraphsTuple, jax.Array]:
        """Return the graph for the model and the updated `wanted` of the state."""
        if not capacity.near_edges or uses_all_pairs(self.model, graph):
            return graph, state.wanted
        # without the barrier XLA recomputes the edge indices for each gathered feature
        graph, count = jax.lax.optimization_barrier(
            edges_within_cutoff(graph, self.cutoffs.cutoff, capacity.near_edges)
        )
        return graph, state.wanted.at[2].set(count)


def _motion(state: DynamicsState) -> Motion:
    """Return the motion of a state, with zero heat."""
    return Motion(
        state.positions, state.low, state.velocities, state.cell, jnp.zeros_like(state.heat)
    )


def _add_compensated(total, low, change):
    """Return total + change and its rounding error, by compensated summation."""
    change = change + low
    new = total + change
    return new, change - (new - total)
