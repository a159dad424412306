"""Tests for batched minimizers against ASE's, on clusters with Morse bonds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.morse import MorsePotential
from ase.optimize import BFGS as AseBFGS
from ase.optimize import FIRE as AseFIRE

from mlip_jax.simulation.relaxation import minimizers
from mlip_jax.simulation.relaxation.minimizers.bfgs import BFGS
from mlip_jax.simulation.relaxation.minimizers.fire import FIRE

SIZES = (5, 8, 13, 8)
LARGEST = max(SIZES)
DEPTH, STEEPNESS, LENGTH = 3.0, 4.0, 1.5


def starts(seed=0, spread=1.2):
    """Return random clusters: their Hessians have negative eigenvalues at first."""
    rng = np.random.default_rng(seed)
    clusters = []
    for n in SIZES:
        x = rng.normal(size=(n, 3)) * spread
        for _ in range(200):  # pushed apart, so that no atom is expelled at once
            d = x[:, None] - x[None]
            r = np.linalg.norm(d, axis=-1) + np.eye(n) * 9
            x = x + 0.05 * (np.where(r < 1.3, 1.3 - r, 0)[:, :, None] * d / r[:, :, None]).sum(1)
        clusters.append(x)
    return clusters


def morse(x, n):
    """Return the energy of the first n of LARGEST atoms at x, (3 * LARGEST,)."""
    x = x.reshape(LARGEST, 3)
    i, j = np.triu_indices(LARGEST, 1)
    real = (i < n) & (j < n)
    squared = ((x[i] - x[j]) ** 2).sum(-1)
    decay = jnp.exp(STEEPNESS * (1 - jnp.sqrt(jnp.where(real, squared, 1.0)) / LENGTH))
    return jnp.where(real, DEPTH * decay * (decay - 2), 0.0).sum()


@functools.partial(jax.jit, static_argnums=(0, 2))
def trajectory(minimizer, x, steps, active=None):
    """Return positions (steps + 1, M, D), negative eigenvalues and forces of each step."""
    count = jnp.asarray(SIZES)
    forces_of = jax.vmap(lambda x, n: -jax.grad(morse)(x, n))

    def step(carry, k):
        x, state, moved = carry
        on = jnp.ones(len(SIZES), bool) if active is None else active[k]
        forces = forces_of(x, count)
        new, state = minimizer.step(state, x, forces, moved == 0, on)
        return (new, state, moved + on), (x, getattr(state, "negative", moved), forces)

    start = (x, minimizer.init(*x.shape, x.dtype), jnp.zeros(len(SIZES), jnp.int32))
    return jax.lax.scan(step, start, jnp.arange(steps + 1))[1]


def padded(positions):
    out = np.zeros((len(SIZES), 3 * LARGEST))
    for m, x in enumerate(positions):
        out[m, : x.size] = x.ravel()
    return jnp.asarray(out)


def trajectory_of_ase(optimizer, positions, steps):
    frames = []
    atoms = Atoms("Ar" * len(positions), positions)
    atoms.calc = MorsePotential(epsilon=DEPTH, r0=LENGTH, rho0=STEEPNESS, rcut1=90.0, rcut2=99.0)
    with optimizer(atoms, logfile=None) as run:
        run.attach(lambda: frames.append(atoms.positions.copy()))
        run.run(fmax=0.0, steps=steps)
    return np.array(frames)


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"), [(BFGS(), AseBFGS, 60), (FIRE(), AseFIRE, 100)]
)
def test_steps_equal_those_of_ase(ours, theirs, steps):
    with jax.enable_x64(True):
        positions, negative, _ = (np.asarray(x) for x in trajectory(ours, padded(starts()), steps))
    if isinstance(ours, BFGS):
        assert (negative > 0).any() and (negative[-1] == 0).any(), (
            "the hard part of the method has not been met"
        )
    for m, x in enumerate(starts()):
        expected = trajectory_of_ase(theirs, x, steps)
        np.testing.assert_allclose(
            positions[:, m, : x.size].reshape(-1, *x.shape), expected, rtol=0, atol=1e-6
        )
        assert not positions[:, m, x.size :].any()


def test_the_count_of_negative_eigenvalues_is_exact():
    bfgs = BFGS()
    count = jnp.asarray(SIZES)
    with jax.enable_x64(True):
        x = padded(starts(3))
        state, moved, met = bfgs.init(*x.shape, x.dtype), jnp.zeros(len(SIZES), jnp.int32), set()
        forces_of = jax.jit(jax.vmap(lambda x, n: -jax.grad(morse)(x, n)))
        step = jax.jit(bfgs.step)
        for _ in range(25):
            x, state = step(state, x, forces_of(x, count), moved == 0, jnp.ones(len(SIZES), bool))
            moved += 1
            counted = (np.linalg.eigvalsh(np.asarray(state.inverse)) < 0).sum(1)
            np.testing.assert_array_equal(state.negative, counted)
            np.testing.assert_allclose(
                state.inverse, np.swapaxes(state.inverse, 1, 2), rtol=1e-9, atol=1e-12
            )
            met.update(counted.tolist())
    assert len(met) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", minimizers.names())
def test_minima_are_found_in_float32_and_float64(name):
    minimizer = minimizers.create(name)
    for x64 in (False, True):
        with jax.enable_x64(x64):
            x = padded(starts(1)).astype(jnp.float64 if x64 else jnp.float32)
            positions, _, forces = trajectory(minimizer, x, 400)
            norms = jnp.linalg.norm(forces.reshape(401, len(SIZES), -1, 3), axis=-1).max(-1)
            assert positions.dtype == x.dtype
            # the smallest one: without a stop FIRE continues, and so does rounding
            assert (norms.min(0) < 5e-3).all(), norms.min(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", minimizers.names())
def test_inactive_molecules_are_unchanged(name):
    """Steps of molecules in an arbitrary order equal those of all molecules at once."""
    minimizer, steps = minimizers.create(name), 20
    rng = np.random.default_rng(0)
    active = rng.random((3 * steps, len(SIZES))) < 0.5
    with jax.enable_x64(True):
        together = np.asarray(trajectory(minimizer, padded(starts()), steps)[0])
        apart = np.asarray(
            trajectory(minimizer, padded(starts()), 3 * steps - 1, jnp.asarray(active))[0]
        )
    for m in range(len(SIZES)):
        own_steps = apart[active[:, m], m][:steps]
        np.testing.assert_allclose(own_steps, together[: len(own_steps), m], rtol=0, atol=1e-9)
        assert len(own_steps) == steps


@pytest.mark.slow
def test_no_atom_moves_further_than_maxstep():
    with jax.enable_x64(True):
        for name in ("bfgs", "lbfgs", "fire"):
            positions = np.asarray(
                trajectory(minimizers.create(name, 0.05), padded(starts()), 20)[0]
            )
            moves = np.linalg.norm(
                np.diff(positions, axis=0).reshape(20, len(SIZES), -1, 3), axis=-1
            )
            assert moves.max() <= 0.05 * (1 + 1e-9) and moves.max() > 0.03


def test_unknown_names_and_invalid_steps_are_rejected():
    with pytest.raises(ValueError, match="Did you mean 'lbfgs'"):
        minimizers.create("lbfg")
    with pytest.raises(ValueError, match="maxstep must be positive"):
        minimizers.create("bfgs", 0.0)
