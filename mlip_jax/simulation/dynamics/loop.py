"""The loop of molecular dynamics: one compiled program that makes many steps of many molecules. Pure.

    M   molecules       N   atoms of all of them, padding included       R   records       F   frames

A step that would need a larger capacity for neighbours, or a list that only the host can make, is not made: the
state stays what it was, and the loop comes back to the host. A molecule that breaks is marked and stands still from
then on; the others do not notice.
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
    """What is compiled into the program; everything here is static.

    Attributes:
      model: On the contract of mlip_jax.models. energy_scale: eV per unit of its output. cutoffs: Of neighbour lists.
      integrator: See integrators.py.
      lists_on_device: Whether the device makes the lists.
      longest_move: Å; an atom that moves further in one step breaks its molecule. A list of the host, which is made at
        the place where a step begins, must be good for a step: half the skin at most.
      bond_range: A bond is broken when its length over the sum of the covalent radii leaves this range.
      record_every, frame_every: Steps; 0: none. records, frames: Rows and frames of a dispatch, R and F.
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

    def run(self, capacity: NeighborCapacity, params, particles: Particles, key, timestep: jax.Array,
            state: DynamicsState, until: jax.Array) -> tuple[DynamicsState, Records]:
        """Make steps until `until` is reached, records or frames are full, nothing moves, or the host is wanted.

        Args:
          capacity: Static shapes of the list, and of what the model gets of it.
          key: Of random numbers; those of a step are made of it and the step.
          timestep: In ASE's unit of time.
        """
        records = self._empty(state)

        def wanted(carry):
            state, _, records = carry
            left = (records.num_records < self.records) & (records.num_frames < self.frames)
            return (state.step < until) & left & ~state.stale & capacity.holds(state.wanted) & (
                state.code == RUNNING).any()

        def iterate(carry):
            state, ahead, records = carry
            state, ready = self._listed(capacity, particles, state, ahead)
            state, ahead, due = self._stepped(capacity, params, particles, key, timestep, state, ahead, ready, until)
            return state, ahead, self._recorded(particles, timestep, state, records, due)

        nothing = HalfStep(_motion(state), state.code, jnp.asarray(True), jnp.asarray(False), jnp.asarray(False))
        state, _, records = jax.lax.while_loop(wanted, iterate, (state, nothing, records))
        return state, records

    def _listed(self, capacity, particles, state: DynamicsState, ahead: HalfStep) -> tuple[DynamicsState, jax.Array]:
        """The state with the list that the step ahead needs, and whether that step can be made, () bool.

        If it cannot, `wanted` or `stale` of the state tells what the host has to do.
        """
        if not self.lists_on_device:
            return state._replace(stale=ahead.moved), ~ahead.moved
        graph, wanted = jax.lax.cond(
            ahead.moved,
            lambda: neighbors.on_device(
                particles, ahead.motion.positions, ahead.motion.cell, capacity.budget, self.cutoffs),
            lambda: (state.graph, state.wanted[:2]))
        wanted = jnp.append(wanted, 0)
        ready = capacity.holds(wanted) & ~ahead.narrow
        made = state._replace(graph=graph, lists=state.lists + (ahead.moved & ready))
        state = jax.lax.cond(ready, lambda: made, lambda: state)
        return state._replace(wanted=wanted, stale=ahead.narrow), ready

    def _stepped(self, capacity, params, particles, key, timestep, state: DynamicsState, ahead: HalfStep, ready, until):
        """Steps with one list: until one is to be recorded, or the next one needs another list, or there is no next.

        Nothing is made that an inner step need not do: what depends on the list alone is computed once.

        Returns:
          State, what is ahead of it, and whether its step is to be recorded.
        """
        graph = state.graph
        bare = state._replace(graph=None)

        def wanted(carry):
            state, ahead, due = carry
            return (ready & ~ahead.moved & ~ahead.narrow & ~due & capacity.holds(state.wanted) & (state.step < until)
                    & (state.code == RUNNING).any())

        def iterate(carry):
            state, ahead, _ = carry
            # At the start of a dispatch there is nothing to finish. That the first half of a step stands in one
            # place of the program makes its digits the same wherever a dispatch began.
            finished = jax.lax.cond(
                ahead.empty, lambda: state,
                lambda: self._finished(capacity, params, particles, key, timestep, state, graph, ahead))
            enough = capacity.holds(finished.wanted)
            new = jax.tree.map(lambda a, b: jnp.where(enough, b, a), state, finished)._replace(wanted=finished.wanted)
            due = jnp.asarray(False)
            for every in (self.record_every, self.frame_every):
                due |= (new.step % every == 0) if every else False
            return new, self._begun(particles, key, timestep, new, graph), due & ~ahead.empty & enough

        state, ahead, due = jax.lax.while_loop(
            wanted, iterate, (bare, ahead._replace(moved=jnp.asarray(False)), jnp.asarray(False)))
        return state._replace(graph=graph), ahead, due

    @staticmethod
    def _time(timestep, key, state: DynamicsState):
        """Length of the step after the state, zero for the one that finds the forces, and its random key."""
        dt = jnp.where(state.step == NEW, 0.0, timestep).astype(state.positions.dtype)
        return dt, jax.random.fold_in(key, state.step)

    def _begun(self, particles, key, timestep, state: DynamicsState, graph) -> HalfStep:
        """The first half of the step after the state, up to where forces are needed."""
        dt, key = self._time(timestep, key, state)
        start = _motion(state)
        begun = self.integrator.begin(start, state.forces, state.virial, particles, dt, key)
        code = self._flown(particles, state, begun)
        begun = _where_running(code, particles, begun, start)
        moved = neighbors.has_moved(graph, particles, begun.positions, begun.cell, self.cutoffs)
        narrow = ~self._is_wide(particles, begun) if self.lists_on_device else jnp.asarray(False)
        return HalfStep(begun, code, jnp.asarray(False), moved, narrow)

    def _is_wide(self, particles, begun: Motion) -> jax.Array:
        """Whether the nearest images are all that the device needs, which a cell that shrinks may put an end to."""
        if begun.cell is None:
            return jnp.asarray(True)
        planes = 1 / jnp.linalg.norm(jnp.linalg.inv(begun.cell), axis=-2)
        return (jnp.where(particles.periodic, planes, jnp.inf) > 2 * neighbors.longest(self.cutoffs)).all()

    def _flown(self, particles, state: DynamicsState, begun: Motion) -> jax.Array:
        """Codes with those marked that have moved too far, or nowhere, in one step."""
        moved = begun.positions - state.positions
        far = ~((moved * moved).sum(-1) <= self.longest_move ** 2)
        far = _any_of_molecule(far, particles)
        return jnp.where((state.code == RUNNING) & far, md_state.TOO_FAST, state.code)

    def _finished(self, capacity, params, particles, key, timestep, state: DynamicsState, graph,
                  ahead: HalfStep) -> DynamicsState:
        """The second half of a step, with the forces at the new positions."""
        begun, code = ahead.motion, ahead.code
        dt, key = self._time(timestep, key, state)
        graph_globals = graph.globals if begun.cell is None else graph.globals | {
            "cell": graph.globals["cell"].at[:-1].set(begun.cell)}
        graph = graph._replace(nodes=graph.nodes | {"positions": begun.positions}, globals=graph_globals)
        graph, wanted = self._near(capacity, state, graph)
        out = evaluate(self.model, params, graph, self.energy_scale, self.integrator.needs_stress)
        virial = jnp.trace(out.stress[:-1], axis1=1, axis2=2) if self.integrator.needs_stress else state.virial
        # The start is taken off each atom: sums of differences have digits that sums of energies have not.
        energies = jnp.where(state.step == NEW, out.energies, state.energies)
        num = state.code.shape[0]
        energy = jax.ops.segment_sum(out.energies - energies, particles.molecule, num + 1, indices_are_sorted=True)
        ended = self.integrator.end(begun, out.forces, particles, dt, key)
        finite = jnp.isfinite(energy[:num]) & ~_any_of_molecule(
            ~jnp.isfinite(out.forces).all(-1) | ~jnp.isfinite(ended.velocities).all(-1), particles)
        code = jnp.where((code == RUNNING) & ~finite, md_state.NOT_FINITE, code)
        goes_on = code == RUNNING  # those that break by the next two are shown as they break
        code, culprit = self._watched(particles, state, ended, code)
        heat, heat_low = _compensated(state.heat, state.heat_low, ended.heat)
        step = state.step + 1
        new = dict(positions=ended.positions, low=ended.low, velocities=ended.velocities, forces=out.forces,
                   virial=virial, cell=ended.cell, energy=energy[:num], heat=heat, heat_low=heat_low)
        kept = {name: _select(goes_on, particles, value, getattr(state, name)) for name, value in new.items()}
        return state._replace(
            **kept, step=step, energies=energies, code=code, culprit=culprit, wanted=wanted,
            broken_at=jnp.where((state.code == RUNNING) & (code != RUNNING), step, state.broken_at))

    def _near(self, capacity, state: DynamicsState, graph) -> tuple[jraph.GraphsTuple, jax.Array]:
        """The graph that the model gets, and what the state is to say of the capacity that it needs."""
        if not capacity.near:
            return graph, state.wanted
        # else XLA computes the places of edges again for each feature that it fetches
        graph, count = jax.lax.optimization_barrier(near(graph, self.cutoffs.cutoff, capacity.near))
        return graph, state.wanted.at[2].set(count)

    def _watched(self, particles, state, ended: Motion, code):
        """Codes with those marked whose bonds have broken or which are too hot, and numbers of the broken bonds."""
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
            worst = jax.ops.segment_max(jnp.where(bad, jnp.arange(len(ratio)), -1), molecule, num)
            place = jnp.maximum(worst, 0)
            found = jnp.where(worst >= 0, jnp.where(ratio[place] > 1, md_state.STRETCHED, md_state.COLLAPSED), found)
            culprit = jnp.where((code == RUNNING) & (worst >= 0), worst, culprit)
        return jnp.where(code == RUNNING, found, code).astype(jnp.int32), culprit.astype(jnp.int32)

    def _recorded(self, particles, timestep, state: DynamicsState, records: Records, due: jax.Array) -> Records:
        """Records with the row and the frame of this step; `due`: it is to have a row, or a frame, or both."""
        if self.record_every:
            volume = jnp.zeros_like(state.energy) if state.cell is None else jnp.abs(jnp.linalg.det(state.cell))
            kinetic = kinetic_energies(state.velocities, particles)
            inner = self._pressure(particles, timestep, state)
            records = _written(records, "num_records", due & (state.step % self.record_every == 0), self.records, dict(
                step=state.step, energy=state.energy, kinetic=kinetic, heat=state.heat, volume=volume, pressure=inner))
        if self.frame_every:
            values = dict(frame_step=state.step, frame_energy=state.energy, positions=state.positions,
                          velocities=state.velocities, forces=state.forces)
            if state.cell is not None:
                values["cell"] = state.cell
            records = _written(records, "num_frames", due & (state.step % self.frame_every == 0), self.frames, values)
        return records

    def _pressure(self, particles, timestep, state: DynamicsState) -> jax.Array:
        """What the barostat makes of it in the next step, (M,); zero without one."""
        if not self.integrator.needs_stress:
            return jnp.zeros_like(state.energy)
        motion = Motion(state.positions, state.low, state.velocities, state.cell, state.heat)
        return self.integrator.inner_pressure(motion, state.forces, state.virial, particles, timestep)

    def _empty(self, state: DynamicsState) -> Records:
        dtype, num = state.positions.dtype, state.code.shape[0]
        # the last row takes what is not to be kept
        rows, frames = self.records + 1, self.frames + 1
        numbers, atoms = jnp.zeros((rows, num), dtype), jnp.zeros((frames, *state.positions.shape), dtype)
        cell = None if state.cell is None else jnp.zeros((frames, num, 3, 3), dtype)
        return Records(jnp.int32(0), jnp.zeros(rows, jnp.int32), *[numbers] * 5, jnp.int32(0),
                       jnp.zeros(frames, jnp.int32), jnp.zeros((frames, num), dtype), atoms, atoms, atoms, cell)


def _written(records: Records, counter: str, due: jax.Array, capacity: int, values: dict[str, jax.Array]) -> Records:
    """Records with values in the next row, or in the one that is not looked at. Rows are written in place."""
    count = getattr(records, counter)
    row = jnp.where(due, count, capacity)
    return records._replace(**{counter: count + due.astype(jnp.int32)}, **{
        name: jax.lax.dynamic_update_index_in_dim(getattr(records, name), value, row, 0)
        for name, value in values.items()})


def _motion(state: DynamicsState) -> Motion:
    return Motion(state.positions, state.low, state.velocities, state.cell, jnp.zeros_like(state.heat))


def _any_of_molecule(values, particles):
    num = particles.dof.shape[0]
    return jax.ops.segment_max(values.astype(jnp.int32), particles.molecule, num + 1, indices_are_sorted=True)[:num] > 0


def _select(condition, particles, new, old):
    """Arrays of atoms or molecules from `new` where the molecule fulfils the condition (M,), else from `old`."""
    if new is None:
        return None
    if new.shape[0] == particles.molecule.shape[0]:  # there are more atoms than molecules: one is padding
        condition = jnp.append(condition, False)[particles.molecule]
    return jnp.where(condition.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _where_running(code, particles, new: Motion, old: Motion) -> Motion:
    return Motion(*(_select(code == RUNNING, particles, a, b) for a, b in zip(new, old)))


def _compensated(total, low, change):
    change = change + low
    new = total + change
    return new, change - (new - total)


class CompiledDynamics:
    """`DynamicsLoop.run` with parameters and particles that are kept on the device.

    Compiled once for each capacity and number of atoms; programs serve all that have the same `loop`.

    Attributes:
      num_compiles: Programs compiled so far for this one.
    """

    def __init__(self, loop: DynamicsLoop, params: Any, particles: Particles, timestep: float, device=None):
        """
        Args:
          timestep: In ASE's unit of time.
        """
        self.loop, self.num_compiles = loop, 0
        step = particles.masses.dtype.type(timestep)
        self._params, self._particles, self._timestep = jax.device_put((params, particles, step), device)

    def run(self, capacity: NeighborCapacity, key, state: DynamicsState, until: int) -> tuple[DynamicsState, Records]:
        """See `DynamicsLoop.run`."""
        before = _traces.count
        out = _run(self.loop, capacity, self._params, self._particles, key, self._timestep, state, np.int32(until))
        self.num_compiles += _traces.count - before
        return out

    def list(self, capacity: NeighborCapacity, positions, cell) -> jraph.GraphsTuple:
        """The device's list for positions (N, 3) that fits into the capacity."""
        graph, _ = _list(self._particles, positions, cell, capacity.budget, self.loop.cutoffs)
        return graph


class _Traces:
    """How often JAX has traced the loop, which it does once for each program."""

    count = 0


_traces = _Traces()
_list = jax.jit(neighbors.on_device, static_argnums=(3, 4))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(loop, capacity, params, particles, key, timestep, state, until):
    _traces.count += 1
    return loop.run(capacity, params, particles, key, timestep, state, until)
