"""Arrays of the loop of the batched relaxation: molecules, state and outcomes.

M   slots, which hold the molecules of a batch       n   atoms per slot
Q   molecules in the queue                           K   molecules
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.graphs.slots import Slots

FREE = -1  # the key of a slot without a molecule
MAX_ROTATIONS = 48  # those of the cube; no lattice has more


class Symmetry(NamedTuple):
    """Operations of the space group, whose averages symmetrize forces and stresses.

    Attributes:
      rotations: Cartesian rotations over their number, zero beyond it, (..., 48, 3, 3).
      sources: Atom that the operation with each rotation moves to an atom, (..., 48, n) int32.
      translated: First one of the atoms that translations make equivalent to an atom, (..., n)
        int32.
      stress: Projection of the stress, (..., 9, 9).
    """

    rotations: jax.Array
    sources: jax.Array
    translated: jax.Array
    stress: jax.Array

    def of_forces(self, forces: jax.Array) -> jax.Array:
        """Return symmetrized forces, (M, n, 3)."""
        slot = jnp.arange(len(forces))[:, None]
        values = jnp.concatenate([forces, jnp.ones_like(forces[..., :1])], axis=-1)
        sums = jnp.zeros_like(values).at[slot, self.translated].add(values)[slot, self.translated]
        mean = sums[..., :3] / sums[..., 3:]
        moved = mean[slot[..., None], self.sources]  # (M, 48, n, 3)
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("mrxy,mrny->mnx", self.rotations, moved, precision=exact)

    def of_stress(self, stress: jax.Array) -> jax.Array:
        """Return the symmetrized stress, (M, 3, 3)."""
        flat, exact = stress.reshape(len(stress), 9), jax.lax.Precision.HIGHEST
        kept = jnp.einsum("mij,mj->mi", self.stress, flat, precision=exact)
        return kept.reshape(stress.shape)


def empty_symmetry(shape: tuple[int, ...], size: int, dtype) -> Symmetry:
    """Return symmetries without operations of structures with `size` atoms, as NumPy arrays."""
    atoms = np.arange(size, dtype=np.int32)
    return Symmetry(
        np.zeros((*shape, MAX_ROTATIONS, 3, 3), dtype),
        np.broadcast_to(atoms, (*shape, MAX_ROTATIONS, size)).copy(),
        np.broadcast_to(atoms, (*shape, size)).copy(),
        np.zeros((*shape, 9, 9), dtype),
    )


class Cells(NamedTuple):
    """Cells of periodic structures.

    Attributes:
      reference: Lattice vectors of the undeformed cells as rows (Å), (K, 3, 3). Directions
        without periodicity have a vector that completes the basis.
      strain: Deformation F of the cells, as F - 1 or log F, see relaxation/cells/filters.py,
        (K, 3, 3).
      periodic: Whether each direction is periodic, (K, 3) bool.
      mask: 1 for components of the strain that relax, 0 for fixed ones, (K, 3, 3).
      symmetry: Operations of the space groups that are kept, or None if these are free.
    """

    reference: jax.Array
    strain: jax.Array
    periodic: jax.Array
    mask: jax.Array
    symmetry: Symmetry | None = None


class MoleculeBatch(NamedTuple):
    """Molecules before their relaxation, K of them.

    Attributes:
      key: Number assigned by the caller, (K,) int32.
      slots: Atomic numbers, number of atoms, charge and spin of the molecules.
      positions: Positions (Å), (K, n, 3); of periodic structures those in the undeformed cell.
      mobile: Whether an atom may move, (K, n) bool.
      cells: Cells of periodic structures, or None for molecules.
    """

    key: jax.Array
    slots: Slots
    positions: jax.Array
    mobile: jax.Array
    cells: Cells | None = None


class Outcome(NamedTuple):
    """Last evaluation of K molecules.

    Attributes:
      key: Number assigned by the caller, (K,).
      code: Status code, (K,) int32.
      steps: Number of steps, (K,) int32.
      positions: Positions (Å), (K, n, 3).
      forces: Forces (eV/Å), (K, n, 3).
      energy: Energy minus the reference energies (eV), (K,).
      fmax: Largest norm of the force on a mobile atom (eV/Å), (K,).
      energy_start: Energy of the first evaluation (eV), (K,).
      fmax_start: Largest force of the first evaluation (eV/Å), (K,).
      nearest: Distance of the closest two atoms (Å), (K,).
      evaluated: Whether the molecule fitted into the padding budget, (K,) bool.
      cell: Lattice vectors as rows (Å), (K, 3, 3); None for molecules.
      stress: Stress (eV/Å³), (K, 3, 3); None if the cells are fixed.
    """

    key: jax.Array
    code: jax.Array
    steps: jax.Array
    positions: jax.Array
    forces: jax.Array
    energy: jax.Array
    fmax: jax.Array
    energy_start: jax.Array
    fmax_start: jax.Array
    nearest: jax.Array
    evaluated: jax.Array
    cell: jax.Array | None = None
    stress: jax.Array | None = None


class RelaxationState(NamedTuple):
    """State of a relaxation on the device.

    Attributes:
      now: Molecules in the slots (M).
      moved: Number of steps, (M,) int32.
      energy_start: Energy of the first evaluation (eV), (M,).
      fmax_start: Largest force of the first evaluation (eV/Å), (M,).
      initially_bound: Whether each atom had another one within the cutoff at the start, (M,).
      minimizer: State of the minimizer.
      largest: Edges and pairs of the largest slots, (2,) int32, and of periodic structures images,
        (3,). The padding budget must be enlarged if they exceed it.
      iterations: Number of iterations since the start, () int32.
      evaluated: Number of molecules evaluated since the start, () int32.
    """

    now: MoleculeBatch
    moved: jax.Array
    energy_start: jax.Array
    fmax_start: jax.Array
    initially_bound: jax.Array
    minimizer: Any
    largest: jax.Array
    iterations: jax.Array
    evaluated: jax.Array


class FinishedMolecules(NamedTuple):
    """Finished molecules: the first `count` entries of `outcome` (Q + M)."""

    outcome: Outcome
    count: jax.Array


def empty_outcome(num, size, dtype) -> Outcome:
    """Return an outcome of `num` molecules filled with zeros."""
    whole, real = jnp.zeros(num, jnp.int32), jnp.zeros(num, dtype)
    atoms = jnp.zeros((num, size, 3), dtype)
    return Outcome(
        whole, whole, whole, atoms, atoms, real, real, real, real, real, jnp.zeros(num, bool)
    )


def empty_molecules(num: int, size: int, dtype) -> MoleculeBatch:
    """Return an empty batch with `num` slots, as NumPy arrays on the host to write into."""
    return MoleculeBatch(
        np.full(num, FREE, np.int32),
        Slots(
            np.zeros((num, size), np.int32),
            np.zeros(num, np.int32),
            np.zeros(num, dtype),
            np.zeros(num, dtype),
        ),
        np.zeros((num, size, 3), dtype),
        np.zeros((num, size), bool),
    )
