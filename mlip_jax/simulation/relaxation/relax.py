"""Batched relaxation of lists (`relax`) and streams (`Relaxer`) of molecules and crystals."""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ase import Atoms

from mlip_jax.datasets.molecules.arguments import molecule_records
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.simulation.calculators.conservation import warn_if_not_conservative
from mlip_jax.simulation.device_memory import ProgramTooLarge
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.relaxation import minimizers
from mlip_jax.simulation.relaxation.cells.filters import CellFilter, create_filter
from mlip_jax.simulation.relaxation.cells.pool import SMALLEST_CELL, CellPool
from mlip_jax.simulation.relaxation.cells.symmetry import check_symprec, is_kept, keep_symmetry
from mlip_jax.simulation.relaxation.inputs import find_obstacle, queued_molecule
from mlip_jax.simulation.relaxation.journal import FAILURES
from mlip_jax.simulation.relaxation.pool import SlotPool, slot_size
from mlip_jax.simulation.relaxation.result import Relaxation, build_frame, build_result
from mlip_jax.simulation.relaxation.shared_queue import SharedQueue
from mlip_jax.simulation.relaxation.state import FREE, Outcome
from mlip_jax.simulation.relaxation.status import RUNNING
from mlip_jax.simulation.user_warnings import warn
from mlip_jax.wording import count_of

# _BATCH_ATOMS: atoms per evaluation by platform, such that the data fit the caches of a core or the
# work fills a GPU. A batch is smaller if its program does not fit into the memory, see
# `device_memory`.
_BATCH_ATOMS = {"cpu": 320, "gpu": 16_384, "tpu": 16_384}


def relax(
    molecules: Any,
    force_field: Any = BUNDLED,
    *,
    optimizer: str = "bfgs",
    fmax: float = 0.005,
    max_steps: int = 500,
    maxstep: float = 0.2,
    dtype: str = "float32",
    trajectory_every: int = 0,
    cell: str | CellFilter | None = None,
    symprec: float | None = None,
    progress: bool = False,
) -> list[Relaxation]:
    """Relax molecules in batches on the device and return one result per molecule, in order.

    A molecule that cannot be relaxed has a result that states the reason; the others are relaxed.
    Warns if molecules failed or diverged, or relaxed ones are outside the domain of the force
    field. Periodic structures keep their cells unless `cell` is given.

    >>> (result,) = relax("CCO")  # doctest: +SKIP
    >>> (result,) = relax("CCO", "runs/spice")  # doctest: +SKIP
    >>> result.status, result.atoms.get_potential_energy()  # doctest: +SKIP
    >>> (result,) = relax(bulk("Cu"), "runs/metals", cell="frechet")  # doctest: +SKIP
    >>> result.atoms.cell, result.pressure  # doctest: +SKIP

    Args:
      molecules: ASE's Atoms, a SMILES, the path of a file of molecules, or a list of these.
      force_field: Force field in any form that `simulation.force_fields.load_mean_force_field` accepts:
        a workdir, "IMPORTER:FILE", a `Potential` or a calculator; the mean of several. By default
        that of the package (docs/force_field.md).
      progress: Whether to show a progress bar.
      optimizer, fmax, max_steps, maxstep, dtype, trajectory_every, cell, symprec: See `Relaxer`.

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
        cell=cell,
        symprec=symprec,
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
    failures = [result for result in results if result.status in FAILURES]
    if failures:
        warn(
            f"{len(failures)} of {count_of(len(results), 'molecule')} failed or diverged; the "
            f"first: {failures[0].reason}"
        )
    relaxed = [result.atoms for result in results if result.status not in FAILURES]
    TrustCheck.load(force_field, relaxer.potential).warn(relaxed, "relaxed molecules")
    return results


class Relaxer:
    """Relaxation of many molecules and crystals in batches, each independent of the others.

    Molecules of up to 16, 32, 64, ... atoms share a compiled program. Finished molecules are
    replaced by waiting ones on the device, without a round trip to the host. The neighbor list is
    rebuilt at each step. Periodic structures have programs of their own, with all images within the
    cutoff. Except for rounding, results do not depend on the other molecules of a
    batch.

    Attributes:
      potential: The force field.
      num_compiles: Number of compiled programs used so far.
      pools: Pools of slots used so far, by device, number of atoms, periodicity and symmetry.
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
        cell: str | CellFilter | None = None,
        symprec: float | None = None,
        molecules_only: bool = False,
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
          batch_atoms: Atoms per evaluation; None or 0 chooses by the kind of device. Batches are
            smaller if the compiled program needs more memory than the device has.
          trajectory_every: Steps between the frames that are kept; 0 keeps none. Keeping frames
            costs a round trip to the host at every step.
          devices: Devices to use; None uses all devices of this process.
          cell: Relaxes the cells of periodic structures: "frechet" or "unitcell", with the same
            steps as with ASE's filters of these names, or a `CellFilter` with further options. None
            keeps the cells.
          symprec: Tolerance (Å) of the space groups that periodic structures keep, as with ASE's
            constraint FixSymmetry; requires spglib. None keeps only those of structures that have
            the constraint.
          molecules_only: Whether periodic structures fail.

        Warns with `NonConservativeWarning` if the forces are not the gradient of the energy.

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
        check_symprec(symprec)
        minimizer = minimizers.create(optimizer, maxstep)
        self.potential = load_mean_force_field(force_field)
        warn_if_not_conservative([self.potential])
        self._dtype = np.dtype(dtype)
        self._devices = list(jax.local_devices() if devices is None else devices)
        # A thread per device, so that none waits while the caller uses results. A single CPU has
        # no time to gain: the caller computes on the same cores.
        self._in_threads = len(self._devices) > 1 or self._devices[0].platform != "cpu"
        self._every, self._symprec = trajectory_every, symprec
        self._filter, self._molecules_only = create_filter(cell), molecules_only
        self._batch_atoms = batch_atoms or _BATCH_ATOMS.get(
            self._devices[0].platform, _BATCH_ATOMS["gpu"]
        )
        self._options = {"minimizer": minimizer, "fmax": float(fmax), "max_steps": int(max_steps)}
        self._params = jax.tree.map(
            lambda leaf: np.asarray(leaf, self._dtype), self.potential.params
        )
        self.pools: dict[tuple[int, int, bool, bool], SlotPool] = {}

    @property
    def num_compiles(self) -> int:
        """Return the number of programs used so far."""
        return sum(pool.num_compiles for pool in self.pools.values())

    def statistics(self) -> dict[str, int]:
        """Return counters of the work so far.

        The counters are "iterations" (evaluations of a batch), "evaluated" (molecules in them) and
        "compiles".
        """
        pools = list(self.pools.values())
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
        if not self._in_threads:
            yield from self._on_device(0, shared)
            return
        results: queue.Queue = queue.Queue(maxsize=10_000)
        stop = threading.Event()
        threads = [
            # in a copy of the context: `molecules` may compute with the selected executor
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(self._feed, d, shared, results, stop),
                daemon=True,
            )
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
        pools: dict[tuple[int, bool, bool], SlotPool] = {}  # by size, periodicity and symmetry
        numbers = iter(range(2**31 - 1))
        # molecules in queues and slots by number: (key, molecule, frames so far)
        in_progress: dict[int, tuple[Hashable, Atoms, list[Atoms]]] = {}
        while True:
            while not any(pool.is_full() for pool in pools.values()):
                item = shared.next()
                if item is None:
                    break
                key, atoms = item
                atoms, reason = self._check(atoms)
                if reason:
                    yield key, Relaxation(atoms, "failed", reason)
                    continue
                number = next(numbers)
                in_progress[number] = (key, atoms, [])
                periodic = bool(atoms.pbc.any())
                size = slot_size(len(atoms), *([SMALLEST_CELL] if periodic else []))
                kind = size, periodic, is_kept(atoms)
                if kind not in pools:
                    pools[kind] = self._get_pool(device, *kind)
                pools[kind].add(queued_molecule(number, atoms, self._dtype, self._filter))
            if shared.is_empty:
                for shared_kind in {k[1:] for k in pools}:
                    self._merge_small_pools(
                        {k: p for k, p in pools.items() if k[1:] == shared_kind}
                    )
            busy = [pool for pool in pools.values() if pool.num_left]
            if not busy:
                return
            pool = max(busy, key=lambda p: p.num_waiting)
            for outcome in self._run_pool(pool, shared.is_empty, in_progress):
                key, atoms, frames = in_progress.pop(int(outcome.key))
                yield key, self._result(atoms, outcome, frames if self._every else None)

    def _check(self, atoms: Atoms) -> tuple[Atoms, str]:
        """Return a structure, with its symmetry if that is kept, and what prevents a relaxation."""
        reason = find_obstacle(atoms, self.potential, self._filter, self._molecules_only)
        if reason or self._symprec is None or is_kept(atoms) or not atoms.pbc.any():
            return atoms, reason
        try:
            kept = keep_symmetry(atoms, self._symprec)
        except Exception as error:  # of spglib and of ASE's functions that call it
            return atoms, f"the space group cannot be determined: {error}"
        return kept, find_obstacle(kept, self.potential, self._filter)

    def _get_pool(self, device: int, size: int, periodic: bool, symmetric: bool) -> SlotPool:
        """Return the pool for slots of `size` atoms on a device; create it if necessary."""
        key = device, size, periodic, symmetric
        if key not in self.pools:
            options = {
                "size": size,
                "dtype": self._dtype,
                "batch_atoms": self._batch_atoms,
                "device": self._devices[device],
            }
            shared = self.potential, self._params, self._options
            self.pools[key] = (
                CellPool(*shared, filter=self._filter, symmetric=symmetric, **options)
                if periodic
                else SlotPool(*shared, **options)
            )
        return self.pools[key]

    def _merge_small_pools(self, pools: dict[tuple[int, bool, bool], SlotPool]) -> None:
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
        try:
            done, last = pool.run(input_ended, 1 if self._every else None)
        except (jax.errors.JaxRuntimeError, ProgramTooLarge) as error:
            if not isinstance(error, ProgramTooLarge) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            for number in pool.shrink(error):
                in_progress[number][2].clear()  # frames of molecules that start again
            return []
        if self._every:
            for m in np.flatnonzero(last.evaluated & (last.key != FREE)):
                if last.steps[m] % self._every == 0 or last.code[m] != RUNNING:
                    _, atoms, frames = in_progress[int(last.key[m])]
                    outcome = jax.tree.map(lambda x, m=m: x[m], last)
                    frames.append(build_frame(self.potential, atoms, outcome))
        return done

    def _result(self, atoms: Atoms, outcome: Outcome, frames) -> Relaxation:
        pressure = self._filter.scalar_pressure if self._filter else 0.0
        return build_result(self.potential, atoms, outcome, frames, pressure)
