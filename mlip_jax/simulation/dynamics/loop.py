"""Loop of batched molecular dynamics: one compiled program with many steps of many molecules. Pure.

    M   molecules       N   atoms of all molecules, including padding
    R   records         F   frames

An iteration of the loop has these steps:

1. rebuild the neighbor list if the next step needs another one (`DynamicsLoop._listed`);
2. with this list, repeat the inner steps (`DynamicsLoop._stepped`):

   - evaluate the forces and apply the second half of the kick (`DynamicsLoop._finished`);
   - mark molecules whose bonds broke or that are too hot (`DynamicsLoop._watched`);
   - apply the first half of the next kick and the drift (`DynamicsLoop._begun`);
   - leave the repetition if the step is to be recorded or the next one needs another list;

3. record energies and frames if they are due (`DynamicsLoop._recorded`);
4. return to the host if the dispatch is complete, no molecule is left, or the host has to step in.

If a step needs a larger neighbor capacity, or a list that only the host can build, the step is not
made: the state remains unchanged and the loop returns to the host. A molecule that breaks is marked
and frozen from then on; the other molecules are not affected.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.potential import evaluate
from mlip_jax.simulation.dynamics import neighbors
from mlip_jax.simulation.dynamics import state as md_state
from mlip_jax.simulation.dynamics.cutoff_filter import near
from mlip_jax.simulation.dynamics.integrators import Motion, Verlet, kinetic_energies
from mlip_jax.simulation.dynamics.neighbors import Cutoffs, NeighborCapacity
from mlip_jax.simulation.dynamics.state import NEW, RUNNING, DynamicsState, HalfStep, Records
from mlip_jax.simulation.dynamics.system import Particles


@dataclasses.dataclass(frozen=True)
class DynamicsLoop:
    """Configuration of the compiled program; everything here is static.

    Attributes:
      model: Model with the interface of mlip_jax.models.
      energy_scale: Energy per unit of the model's output (eV).
      cutoffs: Cutoffs of the neighbor lists.
      integrator: Integrator, see integrators.py.
      lists_on_device: Whether the device builds the neighbor lists.
      longest_move: Maximum displacement of an atom in one step (Å); a longer one breaks the
        molecule. A list that the host builds before a step must cover the step, so at most half the
        skin.
      bond_range: Range of the bond length over the sum of the covalent radii; outside it a bond is
        broken.
      record_every: Steps between rows; 0 records none.
      frame_every: Steps between frames; 0 records none.
      records: Maximum number of rows of a dispatch (R).
      frames: Maximum number of frames of a dispatch (F).
    """

    model: nn.Module
    energy_scale: float
    cutoffs: Cutoffs
    integrator: Verlet
    lists_on_device: bool
    longest_move: float
    bond_range: tuple[float, float]
    record_every: int
    frame_every: int
    records: int
    frames: int

    def run(
        self,
        capacity: NeighborCapacity,
        params,
        particles: Particles,
        key,
        timestep: jax.Array,
        state: DynamicsState,
        until: jax.Array,
    ) -> tuple[DynamicsState, Records]:
        """Make steps until the dispatch is complete or the host has to step in.

        The dispatch is complete if `until` is reached, records or frames are full, or no molecule
        is running.

        Args:
          capacity: Shapes of the list and of the edges that the model receives. Static.
          params: Parameters of the model.
          particles: Atoms.
          key: Random key of the run; each step folds its number into it.
          timestep: Time step in ASE's unit of time.
          state: State to continue from.
          until: Step to stop at.

        Returns:
          The state and the records of the dispatch.
        """
        records = self._empty(state)

        def wanted(carry):
            state, _, records = carry
            left = (records.num_records < self.records) & (records.num_frames < self.frames)
            return (
                (state.step < until)
                & left
                & ~state.stale
                & capacity.holds(state.wanted)
                & (state.code == RUNNING).any()
            )

        def iterate(carry):
            state, ahead, records = carry
            state, ready = self._listed(capacity, particles, state, ahead)
            state, ahead, due = self._stepped(
                capacity, params, particles, key, timestep, state, ahead, ready, until
            )
            return state, ahead, self._recorded(particles, timestep, state, records, due)

        nothing = HalfStep(
            _motion(state), state.code, jnp.asarray(True), jnp.asarray(False), jnp.asarray(False)
        )
        state, _, records = jax.lax.while_loop(wanted, iterate, (state, nothing, records))
        return state, records

    def _listed(
        self, capacity, particles, state: DynamicsState, ahead: HalfStep
    ) -> tuple[DynamicsState, jax.Array]:
        """Return the state with the list for the pending step, and whether the step is possible.

        If it is not, `wanted` or `stale` of the state indicates what the host has to do.
        """
        if not self.lists_on_device:
            return state._replace(stale=ahead.moved), ~ahead.moved
        graph, wanted = jax.lax.cond(
            ahead.moved,
            lambda: neighbors.on_device(
                particles, ahead.motion.positions, ahead.motion.cell, capacity.budget, self.cutoffs
            ),
            lambda: (state.graph, state.wanted[:2]),
        )
        wanted = jnp.append(wanted, 0)
        ready = capacity.holds(wanted) & ~ahead.narrow
        made = state._replace(graph=graph, lists=state.lists + (ahead.moved & ready))
        state = jax.lax.cond(ready, lambda: made, lambda: state)
        return state._replace(wanted=wanted, stale=ahead.narrow), ready

    def _stepped(
        self,
        capacity,
        params,
        particles,
        key,
        timestep,
        state: DynamicsState,
        ahead: HalfStep,
        ready,
        until,
    ):
        """Make steps with one list.

        Stop after a step that is to be recorded, before a step that needs another list, and at the
        end of the dispatch. Quantities that depend only on the list are computed once.

        Returns:
          The state, the pending half step, and whether the last step is to be recorded.
        """
        graph = state.graph
        bare = state._replace(graph=None)

        def wanted(carry):
            state, ahead, due = carry
            return (
                ready
                & ~ahead.moved
                & ~ahead.narrow
                & ~due
                & capacity.holds(state.wanted)
                & (state.step < until)
                & (state.code == RUNNING).any()
            )

        def iterate(carry):
            state, ahead, _ = carry
            # There is nothing to finish at the start of a dispatch. The program contains the first
            # half of a step only once, so results do not depend on where a dispatch starts.
            finished = jax.lax.cond(
                ahead.empty,
                lambda: state,
                lambda: self._finished(
                    capacity, params, particles, key, timestep, state, graph, ahead
                ),
            )
            enough = capacity.holds(finished.wanted)
            # a step with too many edges within the cutoff is undone, except for the number of edges
            new = jax.tree.map(lambda a, b: jnp.where(enough, b, a), state, finished)._replace(
                wanted=finished.wanted
            )
            due = jnp.asarray(False)
            for every in (self.record_every, self.frame_every):
                due |= (new.step % every == 0) if every else False
            return (
                new,
                self._begun(particles, key, timestep, new, graph),
                due & ~ahead.empty & enough,
            )

        state, ahead, due = jax.lax.while_loop(
            wanted, iterate, (bare, ahead._replace(moved=jnp.asarray(False)), jnp.asarray(False))
        )
        return state._replace(graph=graph), ahead, due

    @staticmethod
    def _time(timestep, key, state: DynamicsState):
        """Return the length of the next step and its random key.

        The length is zero for the step that only evaluates the initial forces.
        """
        dt = jnp.where(state.step == NEW, 0.0, timestep).astype(state.positions.dtype)
        return dt, jax.random.fold_in(key, state.step)

    def _begun(self, particles, key, timestep, state: DynamicsState, graph) -> HalfStep:
        """Make the first half of the next step, up to the evaluation of the forces."""
        dt, key = self._time(timestep, key, state)
        start = _motion(state)
        begun = self.integrator.begin(start, state.forces, state.virial, particles, dt, key)
        code = self._flown(particles, state, begun)
        begun = _where_running(code, particles, begun, start)
        moved = neighbors.has_moved(graph, particles, begun.positions, begun.cell, self.cutoffs)
        narrow = ~self._is_wide(particles, begun) if self.lists_on_device else jnp.asarray(False)
        return HalfStep(begun, code, jnp.asarray(False), moved, narrow)

    def _is_wide(self, particles, begun: Motion) -> jax.Array:
        """Return whether the cell is large enough for lists of nearest images, () bool.

        A cell that shrinks may become too small.
        """
        if begun.cell is None:
            return jnp.asarray(True)
        planes = 1 / jnp.linalg.norm(jnp.linalg.inv(begun.cell), axis=-2)
        return (
            jnp.where(particles.periodic, planes, jnp.inf) > 2 * neighbors.longest(self.cutoffs)
        ).all()

    def _flown(self, particles, state: DynamicsState, begun: Motion) -> jax.Array:
        """Return status codes, (M,), after marking molecules that moved too far or to NaN."""
        moved = begun.positions - state.positions
        # negated, so that NaN counts as too far
        far = ~((moved * moved).sum(-1) <= self.longest_move**2)
        far = _any_of_molecule(far, particles)
        return jnp.where((state.code == RUNNING) & far, md_state.TOO_FAST, state.code)

    def _finished(
        self,
        capacity,
        params,
        particles,
        key,
        timestep,
        state: DynamicsState,
        graph,
        ahead: HalfStep,
    ) -> DynamicsState:
        """Make the second half of a step with the forces at the new positions."""
        begun, code = ahead.motion, ahead.code
        dt, key = self._time(timestep, key, state)
        graph_globals = (
            graph.globals
            if begun.cell is None
            else graph.globals | {"cell": graph.globals["cell"].at[:-1].set(begun.cell)}
        )
        graph = graph._replace(
            nodes=graph.nodes | {"positions": begun.positions}, globals=graph_globals
        )
        graph, wanted = self._near(capacity, state, graph)
        out = evaluate(self.model, params, graph, self.energy_scale, self.integrator.needs_stress)
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
        energy = jax.ops.segment_sum(
            out.energies - energies, particles.molecule, num + 1, indices_are_sorted=True
        )
        ended = self.integrator.end(begun, out.forces, particles, dt, key)
        finite = jnp.isfinite(energy[:num]) & ~_any_of_molecule(
            ~jnp.isfinite(out.forces).all(-1) | ~jnp.isfinite(ended.velocities).all(-1), particles
        )
        code = jnp.where((code == RUNNING) & ~finite, md_state.NOT_FINITE, code)
        goes_on = code == RUNNING  # a molecule that breaks below keeps the state in which it breaks
        code, culprit = self._watched(particles, state, ended, code)
        heat, heat_low = _compensated(state.heat, state.heat_low, ended.heat)
        step = state.step + 1
        new = dict(
            positions=ended.positions,
            low=ended.low,
            velocities=ended.velocities,
            forces=out.forces,
            virial=virial,
            cell=ended.cell,
            energy=energy[:num],
            heat=heat,
            heat_low=heat_low,
        )
        kept = {
            name: _select(goes_on, particles, value, getattr(state, name))
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

    def _near(self, capacity, state: DynamicsState, graph) -> tuple[jraph.GraphsTuple, jax.Array]:
        """Return the graph for the model and the updated `wanted` of the state."""
        if not capacity.near:
            return graph, state.wanted
        # without the barrier XLA recomputes the edge indices for each gathered feature
        graph, count = jax.lax.optimization_barrier(near(graph, self.cutoffs.cutoff, capacity.near))
        return graph, state.wanted.at[2].set(count)

    def _watched(self, particles, state, ended: Motion, code):
        """Return status codes and broken bonds, (M,) each, after checking heat and bonds."""
        num = code.shape[0]
        kinetic = kinetic_energies(ended.velocities, particles)
        hot = kinetic > 0.5 * particles.dof * particles.hottest
        found = jnp.where(hot, md_state.TOO_HOT, RUNNING)
        culprit = state.culprit
        if particles.bonds.shape[0]:
            i, j = particles.bonds.T
            vectors = ended.positions[j] - ended.positions[i]
            molecule = particles.molecule[i]
            if particles.bond_shifts is not None:
                shifts = particles.bond_shifts.astype(vectors.dtype)
                vectors += jnp.einsum("bc,bcx->bx", shifts, ended.cell[molecule])
            ratio = jnp.sqrt((vectors * vectors).sum(-1)) / particles.bond_length
            bad = (ratio < self.bond_range[0]) | (ratio > self.bond_range[1])
            # last broken bond of each molecule, negative if there is none, (M,)
            worst = jax.ops.segment_max(jnp.where(bad, jnp.arange(len(ratio)), -1), molecule, num)
            place = jnp.maximum(worst, 0)
            found = jnp.where(
                worst >= 0,
                jnp.where(ratio[place] > 1, md_state.STRETCHED, md_state.COLLAPSED),
                found,
            )
            culprit = jnp.where((code == RUNNING) & (worst >= 0), worst, culprit)
        return jnp.where(code == RUNNING, found, code).astype(jnp.int32), culprit.astype(jnp.int32)

    def _recorded(
        self, particles, timestep, state: DynamicsState, records: Records, due: jax.Array
    ) -> Records:
        """Append a row and a frame to the records if the step is `due` for them."""
        if self.record_every:
            volume = (
                jnp.zeros_like(state.energy)
                if state.cell is None
                else jnp.abs(jnp.linalg.det(state.cell))
            )
            kinetic = kinetic_energies(state.velocities, particles)
            inner = self._pressure(particles, timestep, state)
            records = _written(
                records,
                "num_records",
                due & (state.step % self.record_every == 0),
                self.records,
                dict(
                    step=state.step,
                    energy=state.energy,
                    kinetic=kinetic,
                    heat=state.heat,
                    volume=volume,
                    pressure=inner,
                ),
            )
        if self.frame_every:
            values = dict(
                frame_step=state.step,
                frame_energy=state.energy,
                positions=state.positions,
                velocities=state.velocities,
                forces=state.forces,
            )
            if state.cell is not None:
                values["cell"] = state.cell
            records = _written(
                records,
                "num_frames",
                due & (state.step % self.frame_every == 0),
                self.frames,
                values,
            )
        return records

    def _pressure(self, particles, timestep, state: DynamicsState) -> jax.Array:
        """Return the pressure for the barostat's next step, (M,); zero without a barostat."""
        if not self.integrator.needs_stress:
            return jnp.zeros_like(state.energy)
        motion = Motion(state.positions, state.low, state.velocities, state.cell, state.heat)
        return self.integrator.inner_pressure(
            motion, state.forces, state.virial, particles, timestep
        )

    def _empty(self, state: DynamicsState) -> Records:
        """Return empty records."""
        dtype, num = state.positions.dtype, state.code.shape[0]
        # the last row receives the values of steps that are not recorded
        rows, frames = self.records + 1, self.frames + 1
        numbers, atoms = (
            jnp.zeros((rows, num), dtype),
            jnp.zeros((frames, *state.positions.shape), dtype),
        )
        cell = None if state.cell is None else jnp.zeros((frames, num, 3, 3), dtype)
        return Records(
            jnp.int32(0),
            jnp.zeros(rows, jnp.int32),
            *[numbers] * 5,
            jnp.int32(0),
            jnp.zeros(frames, jnp.int32),
            jnp.zeros((frames, num), dtype),
            atoms,
            atoms,
            atoms,
            cell,
        )


def _written(
    records: Records, counter: str, due: jax.Array, capacity: int, values: dict[str, jax.Array]
) -> Records:
    """Write values into the next row if `due`, otherwise into the unused last row. In place."""
    count = getattr(records, counter)
    row = jnp.where(due, count, capacity)
    return records._replace(
        **{counter: count + due.astype(jnp.int32)},
        **{
            name: jax.lax.dynamic_update_index_in_dim(getattr(records, name), value, row, 0)
            for name, value in values.items()
        },
    )


def _motion(state: DynamicsState) -> Motion:
    """Return the motion of a state, with zero heat."""
    return Motion(
        state.positions, state.low, state.velocities, state.cell, jnp.zeros_like(state.heat)
    )


def _any_of_molecule(values, particles):
    """Return whether any atom of each molecule has a true value, (N,) -> (M,)."""
    num = particles.dof.shape[0]
    return (
        jax.ops.segment_max(
            values.astype(jnp.int32), particles.molecule, num + 1, indices_are_sorted=True
        )[:num]
        > 0
    )


def _select(condition, particles, new, old):
    """Return arrays of atoms or molecules: `new` where `condition` (M,) holds, otherwise `old`."""
    if new is None:
        return None
    if (
        new.shape[0] == particles.molecule.shape[0]
    ):  # there are more atoms than molecules: one is padding
        condition = jnp.append(condition, False)[particles.molecule]
    return jnp.where(condition.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _where_running(code, particles, new: Motion, old: Motion) -> Motion:
    """Return the motion `new` of running molecules and `old` of the others."""
    return Motion(*(_select(code == RUNNING, particles, a, b) for a, b in zip(new, old)))


def _compensated(total, low, change):
    """Return total + change and its rounding error, by compensated summation."""
    change = change + low
    new = total + change
    return new, change - (new - total)


class CompiledDynamics:
    """`DynamicsLoop.run` with parameters and particles kept on the device.

    Compiled once per capacity and number of atoms. Objects with equal `loop` share programs.

    Attributes:
      num_compiles: Number of programs compiled so far by this object.
    """

    def __init__(
        self, loop: DynamicsLoop, params: Any, particles: Particles, timestep: float, device=None
    ):
        """Copy parameters and particles to the device.

        Args:
          loop: Static configuration.
          params: Parameters of the model.
          particles: Atoms.
          timestep: Time step in ASE's unit of time.
          device: Device that runs the program; None for the default device.
        """
        self.loop, self.num_compiles = loop, 0
        step = particles.masses.dtype.type(timestep)
        self._params, self._particles, self._timestep = jax.device_put(
            (params, particles, step), device
        )

    def run(
        self, capacity: NeighborCapacity, key, state: DynamicsState, until: int
    ) -> tuple[DynamicsState, Records]:
        """Run `DynamicsLoop.run`."""
        before = _traces.count
        out = _run(
            self.loop,
            capacity,
            self._params,
            self._particles,
            key,
            self._timestep,
            state,
            np.int32(until),
        )
        self.num_compiles += _traces.count - before
        return out

    def list(self, capacity: NeighborCapacity, positions, cell) -> jraph.GraphsTuple:
        """Return the device's neighbor list for positions (N, 3); it must fit the capacity."""
        graph, _ = _list(self._particles, positions, cell, capacity.budget, self.loop.cutoffs)
        return graph


class _Traces:
    """Counter of traces of the loop; JAX traces once per program."""

    count = 0


_traces = _Traces()
_list = jax.jit(neighbors.on_device, static_argnums=(3, 4))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(loop, capacity, params, particles, key, timestep, state, until):
    """Run the loop as one compiled program and count its traces."""
    _traces.count += 1
    return loop.run(capacity, params, particles, key, timestep, state, until)
