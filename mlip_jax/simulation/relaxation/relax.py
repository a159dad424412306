"""Batched relaxation of lists (`relax`) and streams (`Relaxer`) of molecules."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.datasets.molecules.arguments import molecule_records
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.relaxation import minimizers
from mlip_jax.simulation.relaxation.inputs import find_obstacle, fixed_atoms, queued_molecule
from mlip_jax.simulation.relaxation.pool import SlotPool, slot_size
from mlip_jax.simulation.relaxation.shared_queue import SharedQueue
from mlip_jax.simulation.relaxation.state import FREE, Outcome
from mlip_jax.simulation.relaxation.status import RUNNING, RelaxationStatus

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
        max_steps. "diverged": a value is not finite, atoms overlap, an atom left the others, or the
        energy rose although forces are its gradient. "failed": the relaxation could not be started;
        see `reason`.
      reason: Reason for "diverged" or "failed"; otherwise "".
      steps: Number of minimizer steps.
      energy_start: Energy of the first geometry (eV), including the reference energies; NaN if
        unknown.
      energy: Energy of the last geometry (eV), likewise.
      fmax_start: Largest norm of the force on a mobile atom in the first geometry (eV/Å).
      fmax: The same in the last geometry (eV/Å).
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
    molecules: Any,
    force_field: Any,
    *,
    optimizer: str = "bfgs",
    fmax: float = 0.005,
    max_steps: int = 500,
    maxstep: float = 0.2,
    dtype: str = "float32",
    trajectory_every: int = 0,
    progress: bool = False,
) -> list[Relaxation]:
    """Relax molecules in batches on the device and return one result per molecule, in order.

    A molecule that cannot be relaxed has a result that states the reason; the others are relaxed.
    Warns if relaxed molecules are outside the domain of the force field.

    >>> (result,) = relax("CCO", "runs/spice")  # doctest: +SKIP
    >>> result.status, result.atoms.get_potential_energy()  # doctest: +SKIP

    Args:
      molecules: ASE's Atoms, a SMILES, the path of a file of molecules, or a list of these.
      force_field: Force field in any form that `simulation.force_fields.load_mean_force_field` accepts:
        a workdir, "IMPORTER:FILE", a `Potential` or a calculator; the mean of several.
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
    records = [record for group in molecule_records(molecules) for record in group]
    results = [Relaxation(Atoms(), "failed", record.failure) for record in records]
    given = [(k, record.atoms) for k, record in enumerate(records) if record.atoms is not None]
    done = relaxer.stream(given)
    if progress:
        from rich.progress import track

        done = track(done, "relaxing", total=len(given))
    for index, result in done:
        results[index] = result
    relaxed = [result.atoms for result in results if result.status in ("converged", "step limit")]
    TrustCheck.load(force_field, relaxer.potential).warn(relaxed, "relaxed molecules")
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
        force_field: Any,
        *,
        optimizer: str = "bfgs",
        fmax: float = 0.005,
        max_steps: int = 500,
        maxstep: float = 0.2,
        dtype: str = "float32",
        batch_atoms: int | None = None,
        trajectory_every: int = 0,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Create a relaxer.

        Args:
          force_field: Force field in any form that `simulation.force_fields.load_mean_force_field`
            accepts.
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
        for name, value, min_value in (
            ("max_steps", max_steps, 0),
            ("trajectory_every", trajectory_every, 0),
            ("batch_atoms", batch_atoms or 1, 1),
        ):
            if int(value) != value or value < min_value:
                raise ValueError(
                    f"{name} must be an integer of at least {min_value}, received {value}"
                )
        if dtype not in ("float32", "float64"):
            raise ValueError(f'dtype must be "float32" or "float64", received {dtype!r}')
        minimizer = minimizers.create(optimizer, maxstep)
        self.potential = load_mean_force_field(force_field)
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
        shared = SharedQueue(molecules)
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
            # a thread may wait for space in the queue
            while any(thread.is_alive() for thread in threads):
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

    def _on_device(self, device: int, shared: SharedQueue) -> Iterator[tuple[Hashable, Relaxation]]:
        """Yield the results of the molecules that one device takes from `shared`."""
        pools: dict[int, SlotPool] = {}
        numbers = iter(range(2**31 - 1))
        # molecules in queues and slots by number: (key, molecule, frames so far)
        in_progress: dict[int, tuple[Hashable, Atoms, list[Atoms]]] = {}
        while True:
            while not any(pool.is_full() for pool in pools.values()):
                item = shared.next()
                if item is None:
                    break
                key, atoms = item
                reason = find_obstacle(atoms, self.potential)
                if reason:
                    yield key, Relaxation(atoms, "failed", reason)
                    continue
                number = next(numbers)
                in_progress[number] = (key, atoms, [])
                size = slot_size(len(atoms))
                pool = pools.get(size)
                if pool is None:
                    pool = pools[size] = self._get_pool(device, size)
                pool.add(queued_molecule(number, atoms, self._dtype))
            if shared.is_empty:
                self._merge_small_pools(pools)
            busy = [pool for pool in pools.values() if pool.num_left]
            if not busy:
                return
            pool = max(busy, key=lambda p: p.num_waiting)
            for outcome in self._run_pool(pool, shared.is_empty, in_progress):
                key, atoms, frames = in_progress.pop(int(outcome.key))
                yield key, self._result(atoms, outcome, frames if self._every else None)

    def _get_pool(self, device: int, size: int) -> SlotPool:
        """Return the pool for slots of `size` atoms on a device; create it if necessary."""
        if (device, size) not in self._pools:
            self._pools[device, size] = SlotPool(
                self.potential,
                self._params,
                self._options,
                size=size,
                dtype=self._dtype,
                batch_atoms=self._batch_atoms,
                device=self._devices[device],
            )
        return self._pools[device, size]

    def _merge_small_pools(self, pools: dict[int, SlotPool]) -> None:
        """Merge waiting molecules into the largest slots if one evaluation fits them all.

        Compiling a program per size would take longer than relaxing these molecules.
        """
        waiting = [pool for _, pool in sorted(pools.items()) if pool.num_waiting]
        if sum(pool.num_atoms for pool in waiting) > self._batch_atoms:
            return
        for pool in waiting[:-1]:
            if not pool.num_compiles:
                pool.move_queue_to(waiting[-1])

    def _run_pool(self, pool: SlotPool, input_ended: bool, in_progress) -> list[Outcome]:
        """Run a pool for about a second, or for one step if frames are kept."""
        done, last = pool.run(input_ended, 1 if self._every else None)
        if self._every:
            for m in np.flatnonzero(last.evaluated & (last.key != FREE)):
                if last.steps[m] % self._every == 0 or last.code[m] != RUNNING:
                    _, atoms, frames = in_progress[int(last.key[m])]
                    frames.append(self._frame(atoms, jax.tree.map(lambda x, m=m: x[m], last)))
        return done

    def _result(self, atoms: Atoms, outcome: Outcome, frames) -> Relaxation:
        """Build the result of one molecule from its last evaluation."""
        code = RelaxationStatus(int(outcome.code))
        status, reason = code.label, code.message
        reference = self.potential.reference_energies[atoms.numbers].sum()
        start, end = (
            float(reference + np.float64(e)) for e in (outcome.energy_start, outcome.energy)
        )
        # along forces that are not its gradient, the energy may rise
        if self.potential.conservative and status != "diverged" and end - start > _RISE:
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

    def _frame(self, atoms: Atoms, outcome: Outcome) -> Atoms:
        """Return the atoms with positions, energy and forces of an evaluation."""
        n = len(atoms)
        frame = atoms.copy()
        frame.set_positions(
            outcome.positions[:n].astype(np.float64) + atoms.positions.mean(0),
            apply_constraint=False,
        )
        fixed = fixed_atoms(atoms)
        # exactly, without the rounding to the dtype
        frame.positions[fixed] = atoms.positions[fixed]
        energy = self.potential.reference_energies[atoms.numbers].sum() + np.float64(outcome.energy)
        frame.calc = SinglePointCalculator(
            frame, energy=float(energy), forces=outcome.forces[:n].astype(np.float64)
        )
        return frame
