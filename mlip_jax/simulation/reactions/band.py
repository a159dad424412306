"""Nudged elastic bands of many paths in one compiled program. All functions are pure.

    B   paths        P   images per path between its ends        n   atoms per image

The forces are those of ase.mep.NEB with method="improvedtangent" (Henkelman and Jónsson, J. Chem.
Phys. 113, 9978, 2000), with a climbing image (113, 9901). A minimizer moves all images of a path
as one vector, as the optimizers of ASE do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlip_jax.graphs import slots as slot_graphs
from mlip_jax.graphs.image_slots import ImageBudget, build_with_images
from mlip_jax.graphs.long_range import of_boundaries
from mlip_jax.graphs.slots import Box, Slots
from mlip_jax.potential import evaluate
from mlip_jax.simulation.relaxation.minimizers import Minimizer


class Paths(NamedTuple):
    """Constant properties of the paths.

    Attributes:
      slots: Atomic numbers, number of atoms, charge and spin of the images, B * P of them.
      ends: Positions of the first and the last image (Å), (B, 2, n, 3).
      end_energies: Energies of both ends minus the reference energies (eV), (B, 2).
      mobile: Whether an atom may move, (B, n) bool.
      cell: Lattice vectors (Å), (B, 3, 3); None if all paths are open.
      periodic: Whether each direction is periodic, (B, 3) bool, or None.
    """

    slots: Slots
    ends: jax.Array
    end_energies: jax.Array
    mobile: jax.Array
    cell: jax.Array | None = None
    periodic: jax.Array | None = None


class BandState(NamedTuple):
    """State of the bands.

    Attributes:
      positions: Positions of the images (Å), (B, P, n, 3).
      minimizer: State of the minimizer.
      steps: Number of steps, (B,) int32.
      moved: Whether the images have moved since the last evaluation, (B,) bool.
      energies: Energies of the last evaluation minus the reference energies (eV), (B, P).
      forces: Forces of the last evaluation (eV/Å), (B, P, n, 3).
      fmax: Largest force on the band in the last evaluation (eV/Å), (B,).
      needed: Numbers of edges, pairs and images that the evaluation needs, (3,) int32.
      iterations: Number of evaluations, () int32.
    """

    positions: jax.Array
    minimizer: Any
    steps: jax.Array
    moved: jax.Array
    energies: jax.Array
    forces: jax.Array
    fmax: jax.Array
    needed: jax.Array
    iterations: jax.Array


@dataclasses.dataclass(frozen=True)
class Band:
    """Configuration of the compiled program; everything here is static.

    Attributes:
      model: Model with the interface of mlip_jax.models.
      energy_scale: Energy per unit of the model's output (eV).
      cutoff: Cutoff radius (Å).
      long_range_cutoff: Cutoff radius of the long-range pairs (Å), or None.
      minimizer: Minimizer, see relaxation/minimizers.
      spring: Force constant of the springs between images (eV/Å²).
      climb: Whether the highest image climbs to the saddle point.
      fmax: Largest force on a converged band (eV/Å).
      max_steps: Maximum number of steps.
    """

    model: nn.Module
    energy_scale: float
    cutoff: float
    long_range_cutoff: float | None
    minimizer: Minimizer
    spring: float
    climb: bool
    fmax: float
    max_steps: int

    def init(self, positions: jax.Array) -> BandState:
        """Return the state before the first evaluation of images at `positions`."""
        num, images, size, _ = positions.shape
        return BandState(
            positions,
            self.minimizer.init(num, 3 * images * size, positions.dtype),
            jnp.zeros(num, jnp.int32),
            jnp.ones(num, bool),
            jnp.zeros((num, images), positions.dtype),
            jnp.zeros_like(positions),
            jnp.full(num, jnp.inf, positions.dtype),
            jnp.zeros(3, jnp.int32),
            jnp.int32(0),
        )

    def run(
        self, budget: ImageBudget, params, paths: Paths, state: BandState, max_iterations
    ) -> BandState:
        """Iterate until all bands have converged, or the budget is too small.

        Args:
          budget: Padding budget of the graph of all images. Static.
          params: Parameters of the model.
          paths: Paths.
          state: State to continue from.
          max_iterations: Maximum number of evaluations.
        """
        start = state.iterations

        def should_continue(state):
            more = (state.iterations - start < max_iterations) & fits(budget, state.needed)
            return state.moved.any() & more

        return jax.lax.while_loop(
            should_continue, lambda state: self._iterate(budget, params, paths, state), state
        )

    def _iterate(self, budget, params, paths, state) -> BandState:
        """Evaluate all images, and move the images of the bands that are not done."""
        energies, forces, needed = self._evaluate(budget, params, paths, state.positions)
        band = self._band_forces(paths, state.positions, energies, forces)
        fmax = jnp.sqrt((band * band).sum(-1)).max((1, 2))
        complete = fits(budget, needed)
        moves = complete & jnp.isfinite(fmax) & (fmax >= self.fmax)
        moves &= state.steps < self.max_steps
        flat = (len(fmax), -1)
        positions, minimizer = self.minimizer.step(
            state.minimizer,
            state.positions.reshape(flat),
            band.reshape(flat),
            state.steps == 0,
            moves,
        )
        return BandState(
            positions.reshape(state.positions.shape),
            minimizer,
            state.steps + moves,
            jnp.where(complete, moves, state.moved),
            energies,
            forces,
            jnp.where(complete, fmax, state.fmax),
            needed,
            state.iterations + 1,
        )

    def _evaluate(self, budget, params, paths, positions):
        """Return energies (B, P), forces (B, P, n, 3) and the needed sizes (3,)."""
        num, images, size, _ = positions.shape
        far = of_boundaries(self.long_range_cutoff, paths.cell is not None)
        flat, cutoffs = positions.reshape(-1, size, 3), (self.cutoff, far)
        if paths.cell is None:
            batch = slot_graphs.build(paths.slots, flat, budget, *cutoffs)
            shells = jnp.zeros(())
        else:
            box = Box(*(jnp.repeat(x, images, axis=0) for x in (paths.cell, paths.periodic)))
            batch, shells = build_with_images(paths.slots, flat, box, budget, *cutoffs)
        out = evaluate(self.model, params, batch.graph, self.energy_scale)
        forces = slot_graphs.to_slots(batch, out.forces, size).reshape(positions.shape)
        needed = jnp.stack([batch.n_edge.sum(), batch.n_pair.sum(), shells.max()])
        return out.energy[:-1].reshape(num, images), forces, needed.astype(jnp.int32)

    def _band_forces(self, paths, positions, energies, forces):
        """Return the forces on the images of the bands, (B, P, n, 3)."""
        whole = jnp.concatenate([paths.ends[:, :1], positions, paths.ends[:, 1:]], axis=1)
        steps = _differences(paths, whole)  # (B, P + 1, n, 3)
        lengths = jnp.sqrt((steps * steps).sum((2, 3)))
        e = jnp.concatenate([paths.end_energies[:, :1], energies, paths.end_energies[:, 1:]], 1)
        before, after = _tangent_weights(e)
        tangent = _scale(before, steps[:, :-1]) + _scale(after, steps[:, 1:])
        norm = jnp.sqrt((tangent * tangent).sum((2, 3)))
        tangent = _scale(1 / jnp.where(norm > 0, norm, 1.0), tangent)
        forces = jnp.where(paths.mobile[:, None, :, None], forces, 0.0)
        along = (forces * tangent).sum((2, 3))
        spring = self.spring * (lengths[:, 1:] - lengths[:, :-1])
        if self.climb:
            highest = jnp.arange(energies.shape[1]) == jnp.argmax(energies, axis=1)[:, None]
            spring = jnp.where(highest, -along, spring)
        band = forces + _scale(spring - along, tangent)
        return jnp.where(paths.mobile[:, None, :, None], band, 0.0)


def fits(budget: ImageBudget, needed: jax.Array) -> jax.Array:
    """Return whether the graph of all images fits into the budget, () bool."""
    return (
        (needed[0] <= budget.n_edge) & (needed[1] <= budget.n_pair) & (needed[2] <= budget.n_image)
    )


def _differences(paths, whole):
    """Return the vectors between consecutive images, (B, P + 1, n, 3), with nearest images."""
    steps = whole[:, 1:] - whole[:, :-1]
    if paths.cell is None:
        return steps
    box = Box(paths.cell, paths.periodic)
    slot = jnp.arange(len(steps))[:, None, None]
    shifts = box.translations(steps, slot)
    exact = jax.lax.Precision.HIGHEST
    return steps + jnp.einsum("bpnc,bcx->bpnx", shifts, paths.cell, precision=exact)


def _tangent_weights(e):
    """Return the weights of the vectors before and after each image in its tangent, (B, P) each.

    The tangent points to the higher neighbor; at extrema both count.
    """
    center, left, right = e[:, 1:-1], e[:, :-2], e[:, 2:]
    up, down = (right > center) & (center > left), (right < center) & (center < left)
    a, b = jnp.abs(right - center), jnp.abs(left - center)
    large, small = jnp.maximum(a, b), jnp.minimum(a, b)
    after = jnp.where(right > left, large, small)
    before = jnp.where(right > left, small, large)
    one = jnp.ones_like(after)
    return (
        jnp.where(up, 0.0, jnp.where(down, one, before)),
        jnp.where(up, one, jnp.where(down, 0.0, after)),
    )


def _scale(factors, vectors):
    """Multiply vectors (B, P, n, 3) by factors (B, P)."""
    return factors[:, :, None, None] * vectors
