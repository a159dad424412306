"""Batched relaxation of lists (`relax`) and streams (`Relaxer`) of molecules."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation import loop, minimizers
from mlip_jax.simulation.relaxation.pool import QueuedMolecule, SlotPool, slot_size
from mlip_jax.structure import STATES, electronic_value

_REASONS = {
    loop.CONVERGED: ("converged", ""),
    loop.STEP_LIMIT: ("step limit", ""),
    loop.NOT_FINITE: ("diverged", "energy or forces are not finite"),
    loop.ATOMS_OVERLAP: ("diverged", "two atoms came within {nearest:.2f} Å of each other"),
    loop.DISSOCIATED: ("diverged", "an atom flew away from all others, beyond the cutoff"),
}
# _RISE: maximum rise of the energy between start and end that rounding can explain, eV.
_RISE = 1e-3
# _BATCH_ATOMS: atoms per evaluation by platform, such that the data fit the caches of a core or the
# work fills a GPU.
_BATCH_ATOMS = {"cpu": 320, "gpu": 16_384, "tpu": 16_384}


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """Result of relaxing one molecule.

    Attributes:
      atoms: Relaxed molecule, with a calculator that holds energy and forces; the input if the
        status is "failed".
      status: "converged": the largest force is below fmax. "step limit": it was not after
        max_steps. "diverged": a value is not finite, atoms overlap or flew away, or the energy
        rose. "failed": the relaxation could not be started; see `reason`.
      reason: Reason for "diverged" or "failed"; otherwise "".
      steps: Number of minimizer steps.
      energy_start, energy: Energy of the first and the last geometry (eV), including the reference
        energies; NaN if unknown.
      fmax_start, fmax: Largest norm of the force on a mobile atom in the first and the last
        geometry (eV/Å).
      frames: With trajectory_every, every `trajectory_every`-th step and the last one, with
        energies and forces; otherwise None.
    """

    atoms: Atoms
    status: str
    reason: str = ""
    steps: int = 0
    energy_start: float = np.nan
    energy: float = np.nan
    fmax_start: float = np.nan
    fmax: float = np.nan
    frames: list[Atoms] | None = None

    @property
    def converged(self) -> bool:
        """Return whether the status is "converged"."""
        return self.status == "converged"


def relax(
    molecules: Sequence[Atoms],
    force_field: Potential | Calculator | str | Path,
    *,
    optimizer: str = "bfgs",
    fmax: float = 0.05,
    max_steps: int = 500,
    maxstep: float = 0.2,
    dtype: str = "float32",
    trajectory_every: int = 0,
    progress: bool = False,
) -> list[Relaxation]:
    """Relax molecules in batches on the device and return one result per molecule, in order.

    A molecule that cannot be relaxed has a result that states the reason; the others are relaxed.

    >>> from ase.build import molecule
    >>> results = relax([molecule("CH3OH")], "runs/spice")  # doctest: +SKIP
    >>> results[0].status, results[0].atoms.get_potential_energy()  # doctest: +SKIP

    Args:
      molecules: Molecules to relax.
      force_field: Force field in any form that `importers.load_force_field` accepts, such as the
        workdir of a training run.
      progress: Whether to show a progress bar.
      optimizer, fmax, max_steps, maxstep, dtype, trajectory_every: See `Relaxer`.

    Raises:
      ValueError: If an argument is invalid.
      CheckpointError: If there is no force field at this location.
    """
    relaxer = Relaxer(
        force_field,
        optimizer=optimizer,
        fmax=fmax,
        max_steps=max_steps,
        maxstep=maxstep,
        dtype=dtype,
        trajectory_every=trajectory_every,
    )
    results: list[Relaxation | None] = [None] * len(molecules)
    done = relaxer.stream(enumerate(molecules))
    if progress:
        from rich.progress import track

        done = track(done, "relaxing", total=len(molecules))
    for place, result in done:
        results[place] = result
    return results


class Relaxer:
    """Relaxation of many molecules in batches, each independent of the others.

    Molecules of up to 16, 32, 64, ... atoms share a compiled program. Finished molecules are
    replaced by waiting ones on the device, without a round trip to the host. The neighbor list is
    rebuilt at each step. Except for rounding, results do not depend on the other molecules of a
    batch.

    Attributes:
      potential: The force field.
      num_compiles: Number of programs compiled so far.
    """

    def __init__(
        self,
        force_field: Potential | Calculator | str | Path,
        *,
        optimizer: str = "bfgs",
        fmax: float = 0.05,
        max_steps: int = 500,
        maxstep: float = 0.2,
        dtype: str = "float32",
        batch_atoms: int | None = None,
        trajectory_every: int = 0,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Create a relaxer.

        Args:
          force_field: Force field in any form that `importers.load_force_field` accepts, such as
            the workdir of a training run.
          optimizer: "bfgs" (same steps as in ASE), "lbfgs" (for hundreds of atoms), or "fire".
          fmax: Largest force of a relaxed molecule (eV/Å): the norm per atom, as in ASE.
          max_steps: Maximum number of steps per molecule.
          maxstep: Longest step of an atom (FIRE: of all atoms together) (Å).
          dtype: "float32" or "float64", for force field and minimizer. Independent of JAX's x64
            flag.
          batch_atoms: Atoms per evaluation; None or 0 chooses by the kind of device.
          trajectory_every: Steps between the frames that are kept; 0 keeps none. Keeping frames
            costs a round trip to the host at every step.
          devices: Devices to use; None uses all devices of this process.

        Raises:
          ValueError: If an argument is invalid.
          CheckpointError: If there is no force field at this location.
        """
        if not (np.isfinite(fmax) and fmax > 0):
            raise ValueError(f"fmax must be positive (eV/Å), received {fmax}")
        for name, value, least in (
            ("max_steps", max_steps, 0),
            ("trajectory_every", trajectory_every, 0),
            ("batch_atoms", batch_atoms or 1, 1),
        ):
            if int(value) != value or value < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, received {value}"
                )
        if dtype not in ("float32", "float64"):
            raise ValueError(f'dtype must be "float32" or "float64", received {dtype!r}')
        minimizer = minimizers.create(optimizer, maxstep)
        self.potential = load_force_field(force_field)
        self._dtype = np.dtype(dtype)
        self._devices = list(jax.local_devices() if devices is None else devices)
        self._every = trajectory_every
        self._batch_atoms = batch_atoms or _BATCH_ATOMS.get(
            self._devices[0].platform, _BATCH_ATOMS["gpu"]
        )
        self._options = {"minimizer": minimizer, "fmax": float(fmax), "max_steps": int(max_steps)}
        self._params = jax.tree.map(
            lambda leaf: np.asarray(leaf, self._dtype), self.potential.params
        )
        self._pools: dict[tuple[int, int], SlotPool] = {}

    @property
    def num_compiles(self) -> int:
        """Return the number of programs compiled so far."""
        return sum(pool.num_compiles for pool in self._pools.values())

    def statistics(self) -> dict[str, int]:
        """Return counters of the work so far.

        The counters are "iterations" (evaluations of a batch), "evaluated" (molecules in them) and
        "compiles".
        """
        pools = list(self._pools.values())
        return {
            "iterations": sum(p.iterations for p in pools),
            "evaluated": sum(p.evaluated for p in pools),
            "compiles": self.num_compiles,
        }

    def stream(
        self, molecules: Iterable[tuple[Hashable, Atoms]]
    ) -> Iterator[tuple[Hashable, Relaxation]]:
        """Yield (key, result) for each (key, molecule), in the order of completion.

        `molecules` is read as slots become free, so it may be arbitrarily long.
        """
        shared = _Shared(molecules)
        if len(self._devices) == 1:
            yield from self._on_device(0, shared)
            return
        results: queue.Queue = queue.Queue(maxsize=10_000)
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._feed, args=(d, shared, results, stop), daemon=True)
            for d in range(len(self._devices))
        ]
        for thread in threads:
            thread.start()
        try:
            left = len(threads)
            while left:
                kind, item = results.get()
                if kind == "error":
                    raise item
                if kind == "end":
                    left -= 1
                else:
                    yield item
        finally:
            stop.set()
            while any(
                thread.is_alive() for thread in threads
            ):  # a thread may wait for space in the queue
                with contextlib.suppress(queue.Empty):
                    results.get(timeout=0.1)

    def _feed(self, device, shared, results, stop):
        """Relax on one device and put the results into a queue."""
        try:
            for item in self._on_device(device, shared):
                results.put(("item", item))
                if stop.is_set():
                    return
            results.put(("end", None))
        except BaseException as error:  # raised again in `stream`
            results.put(("error", error))

    def _on_device(self, device: int, shared: _Shared) -> Iterator[tuple[Hashable, Relaxation]]:
        """Yield the results of the molecules that one device takes from `shared`."""
        mine: dict[int, SlotPool] = {}
        numbers = iter(range(2**31 - 1))
        held: dict[int, tuple[Hashable, Atoms, list[Atoms]]] = {}
        while True:
            while not any(pool.is_full() for pool in mine.values()):
                item = shared.next()
                if item is None:
                    break
                key, atoms = item
                reason = self._obstacle(atoms)
                if reason:
                    yield key, Relaxation(atoms, "failed", reason)
                    continue
                number = next(numbers)
                held[number] = (key, atoms, [])
                size = slot_size(len(atoms))
                pool = mine.get(size)
                if pool is None:
                    pool = mine[size] = self._pool(device, size)
                pool.add(_waiting(number, atoms, self._dtype))
            if shared.is_empty:
                self._join_the_few(mine)
            busy = [pool for pool in mine.values() if pool.num_left]
            if not busy:
                return
            pool = max(busy, key=lambda p: p.num_waiting)
            for outcome in self._turn(pool, shared.is_empty, held):
                key, atoms, frames = held.pop(int(outcome.key))
                yield key, self._result(atoms, outcome, frames if self._every else None)

    def _pool(self, device: int, size: int) -> SlotPool:
        """Return the pool for slots of `size` atoms on a device; create it if necessary."""
        if (device, size) not in self._pools:
            self._pools[device, size] = SlotPool(
                self.potential,
                self._params,
                self._options,
                size,
                self._dtype,
                self._batch_atoms,
                self._devices[device],
            )
        return self._pools[device, size]

    def _join_the_few(self, pools: dict[int, SlotPool]) -> None:
        """Merge waiting molecules into the largest slots if one evaluation fits them all.

        Compiling a program per size would take longer than relaxing these molecules.
        """
        waiting = [pool for _, pool in sorted(pools.items()) if pool.num_waiting]
        if sum(pool.num_atoms for pool in waiting) > self._batch_atoms:
            return
        for pool in waiting[:-1]:
            if not pool.num_compiles:
                pool.give_all(waiting[-1])

    def _turn(self, pool: SlotPool, no_more: bool, held) -> list[loop.Outcome]:
        """Run a pool for about a second, or for one step if frames are kept."""
        done, last = pool.run(no_more, 1 if self._every else None)
        if self._every:
            for m in np.flatnonzero(last.evaluated & (last.key != loop.FREE)):
                if last.steps[m] % self._every == 0 or last.code[m] != loop.RUNNING:
                    _, atoms, frames = held[int(last.key[m])]
                    frames.append(self._frame(atoms, jax.tree.map(lambda x, m=m: x[m], last)))
        return done

    def _result(self, atoms: Atoms, outcome: loop.Outcome, frames) -> Relaxation:
        """Build the result of one molecule from its last evaluation."""
        status, reason = _REASONS[int(outcome.code)]
        reference = self.potential.reference_energies[atoms.numbers].sum()
        start, end = (
            float(reference + np.float64(e)) for e in (outcome.energy_start, outcome.energy)
        )
        if status != "diverged" and end - start > _RISE:
            status, reason = "diverged", f"the energy rose by {end - start:.3g} eV"
        return Relaxation(
            self._frame(atoms, outcome),
            status,
            reason.format(nearest=float(outcome.nearest)),
            int(outcome.steps),
            start,
            end,
            float(outcome.fmax_start),
            float(outcome.fmax),
            frames,
        )

    def _frame(self, atoms: Atoms, outcome: loop.Outcome) -> Atoms:
        """Return the atoms with positions, energy and forces of an evaluation."""
        n = len(atoms)
        frame = atoms.copy()
        frame.set_positions(
            outcome.positions[:n].astype(np.float64) + atoms.positions.mean(0),
            apply_constraint=False,
        )
        fixed = _fixed(atoms)
        # exactly, without the rounding to the dtype
        frame.positions[fixed] = atoms.positions[fixed]
        energy = self.potential.reference_energies[atoms.numbers].sum() + np.float64(outcome.energy)
        frame.calc = SinglePointCalculator(
            frame, energy=float(energy), forces=outcome.forces[:n].astype(np.float64)
        )
        return frame

    def _obstacle(self, atoms: Atoms) -> str:
        """Return the reason why a molecule cannot be relaxed, or ""."""
        if len(atoms) == 0:
            return "it has no atoms"
        if not np.isfinite(atoms.positions).all():
            bad = int(np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))[0])
            return f"positions are not finite: atom {bad} is at {atoms.positions[bad].tolist()}"
        if atoms.pbc.any():
            return (
                "it is periodic; open molecules are relaxed in batches. Use MLIPCalculator with an optimizer of "
                "ASE"
            )
        unknown = [type(c).__name__ for c in atoms.constraints if not isinstance(c, FixAtoms)]
        if unknown:
            return (
                f"of ASE's constraints FixAtoms alone is known here, received {', '.join(unknown)}"
            )
        try:
            for name in STATES:
                electronic_value(atoms, name)
            self.potential.check_elements(atoms.numbers)
        except ValueError as error:
            return str(error)
        return _overlap(atoms.positions)


class _Shared:
    """Thread-safe iterator over the molecules that no device has taken."""

    def __init__(self, molecules):
        self._molecules, self._lock, self.is_empty = iter(molecules), threading.Lock(), False

    def next(self):
        """Return the next molecule, or None if there is none left."""
        with self._lock:
            if self.is_empty:
                return None
            item = next(self._molecules, None)
            self.is_empty = item is None
            return item


def _overlap(positions: np.ndarray) -> str:
    """Return a message about the closest two atoms if they overlap, or ""."""
    if len(positions) < 2:
        return ""
    from scipy.spatial import cKDTree

    distances, nearest = cKDTree(positions).query(positions, k=2)
    first = int(np.argmin(distances[:, 1]))
    if distances[first, 1] >= loop.SHORTEST:
        return ""
    i, j = sorted((first, int(nearest[first][nearest[first] != first][0])))
    return f"atoms {i} and {j} overlap: they are {distances[first, 1]:.3g} Å apart"


def _fixed(atoms: Atoms) -> np.ndarray:
    """Return the sorted indices of the fixed atoms."""
    parts = [constraint.get_indices() for constraint in atoms.constraints]
    return np.unique(np.concatenate(parts)).astype(int) if parts else np.zeros(0, int)


def _waiting(number: int, atoms: Atoms, dtype) -> QueuedMolecule:
    """Convert a molecule to an entry of the queue."""
    mobile = np.ones(len(atoms), bool)
    mobile[_fixed(atoms)] = False
    # centered at the origin: float32 has fewer digits far from it
    return QueuedMolecule(
        number,
        atoms.numbers,
        (atoms.positions - atoms.positions.mean(0)).astype(dtype),
        mobile,
        *(electronic_value(atoms, name) for name in STATES),
    )
