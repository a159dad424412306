"""Reference method (oracle): energies, forces and minima of many molecules in worker processes.

GFN2-xTB (Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019)) and GFN1-xTB through
tblite, or any ASE calculator. Each worker has one thread. Results are cached on disk as they
arrive, so nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mlip_jax import workers
from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.simulation.reference.result_cache import ResultCache, key_of
from mlip_jax.structure import electronic_state, electronic_value

log = logging.getLogger(__name__)

_FAILURE = {"energy": np.nan, "forces": None, "positions": None, "converged": False, "steps": 0}
TBLITE = ("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB")


class OracleError(RuntimeError):
    """The reference method is unusable."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Reference method.

    Attributes:
      name: One of TBLITE, or "package.module:Class" of an ASE calculator. That module is imported
        and executed; only use code that you trust.
      options: Keyword arguments of the calculator class, serializable as JSON.

    Raises:
      ConfigError: If there is no such method or class.
      ImportError: If its package is missing.
    """

    name: str = "GFN2-xTB"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.calculator_class()

    def calculator_class(self) -> type[Calculator]:
        """Return the class of the ASE calculator."""
        if ":" not in self.name:
            if self.name not in TBLITE:
                raise ConfigError(
                    unknown_name("reference method", self.name, TBLITE)
                    + ' Any other ASE calculator can be given as "package.module:Class".'
                )
            try:
                return importlib.import_module("tblite.ase").TBLite
            except ImportError as error:
                raise ImportError(
                    f"{self.name} requires tblite: pip install 'mlip-flax[data]'"
                ) from error
        module, _, name = self.name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise ImportError(
                f"oracle {self.name!r}: {module} cannot be imported: {error}"
            ) from error
        if not isinstance(cls, type):
            raise ConfigError(f"oracle {self.name!r}: module {module} has no class {name!r}")
        return cls

    def calculator(self, atoms: Atoms) -> Calculator:
        """Create a calculator for a molecule.

        The class receives `charge` if the molecule is charged and `multiplicity` if it has unpaired
        electrons. Their number is `info["num_unpaired_electrons"]`; by default 1 if the number of
        electrons is odd, otherwise 0.
        """
        charge, unpaired = _state(atoms)
        arguments = {"charge": charge} if charge else {}
        arguments |= {"multiplicity": unpaired + 1} if unpaired else {}
        if ":" not in self.name:
            arguments |= {"method": self.name, "verbosity": 0}
        return self.calculator_class()(**{**arguments, **self.options})

    def settings(self) -> dict[str, Any]:
        """Return everything that results depend on, serializable as JSON."""
        package = self.name.split(":")[0].split(".")[0] if ":" in self.name else "tblite"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        return {"method": self.name, "options": dict(self.options), "version": version}


@dataclasses.dataclass(frozen=True)
class ReferenceEvaluation:
    """Energy and forces of the reference method for one molecule.

    Attributes:
      energy: Energy (eV); NaN if the method failed.
      forces: Forces (eV/Å), (n_atoms, 3); None if the method failed.
      error: Error message if the method failed; otherwise "".
      seconds: Duration of the calculation (s); NaN in caches of earlier versions.
    """

    energy: float
    forces: np.ndarray | None
    error: str = ""
    seconds: float = dataclasses.field(default=np.nan, kw_only=True)

    @property
    def fmax(self) -> float:
        """Return the largest force on an atom (eV/Å); NaN without forces."""
        return np.nan if self.forces is None else float(np.linalg.norm(self.forces, axis=1).max())


@dataclasses.dataclass(frozen=True)
class ReferenceRelaxation(ReferenceEvaluation):
    """Last geometry of a relaxation with the reference method.

    Attributes:
      positions: Positions (Å), (n_atoms, 3); None if the method failed.
      converged: Whether the largest force is below the threshold.
      steps: Number of steps.
    """

    positions: np.ndarray | None = None
    converged: bool = False
    steps: int = 0


class Oracle:
    """Reference method with a cache on disk.

    Args:
      method: Reference method.
      cache: Cache of earlier results.
      num_processes: Number of worker processes, which are new interpreters with one thread each;
        None: one per core; 1: this process.
      progress: Whether to show a progress bar.
      timeout: Time limit of a calculation (s), after which it counts as failed; None: no limit.
    """

    def __init__(
        self,
        method: Method,
        cache: ResultCache,
        *,
        num_processes: int | None = None,
        progress: bool = True,
        timeout: float | None = None,
    ):
        self.method, self._cache = method, cache
        self._num_processes, self._progress = num_processes, progress
        self._timeout = timeout

    def evaluate(
        self, molecules: Mapping[str, Atoms], label: str = "energies"
    ) -> dict[str, ReferenceEvaluation]:
        """Compute the energy and forces of each molecule, by name.

        Args:
          molecules: Molecules by name.
          label: Label of the progress bar.

        Raises:
          OracleError: If the method fails at every molecule for reasons other than the molecules.
        """
        results = self._compute(molecules, {"job": "evaluate"}, label)
        return {
            name: ReferenceEvaluation(
                r["energy"], _array(r["forces"]), r["error"], seconds=r.get("seconds", np.nan)
            )
            for name, r in results.items()
        }

    def minimize(
        self,
        molecules: Mapping[str, Atoms],
        *,
        fmax: float = 0.05,
        max_steps: int = 500,
        maxstep: float = 0.2,
        label: str = "minima",
    ) -> dict[str, ReferenceRelaxation]:
        """Compute the minimum that ASE's BFGS reaches from each molecule, by name.

        Args:
          molecules: Molecules by name.
          fmax: Largest force on an atom at the end (eV/Å).
          max_steps: Maximum number of steps.
          maxstep: Longest step of an atom (Å).
          label: Label of the progress bar.

        Raises:
          OracleError: As for `evaluate`.
        """
        settings = {"job": "minimize", "fmax": fmax, "max_steps": max_steps, "maxstep": maxstep}
        results = self._compute(molecules, settings, label)
        return {
            name: ReferenceRelaxation(
                r["energy"],
                _array(r["forces"]),
                r["error"],
                _array(r["positions"]),
                r["converged"],
                r["steps"],
            )
            for name, r in results.items()
        }

    def _compute(self, molecules, settings, label) -> dict[str, dict[str, Any]]:
        """Return the result of each molecule, by name, from the cache or the workers."""
        keys = {
            name: key_of(settings | self.method.settings(), atoms)
            for name, atoms in molecules.items()
        }
        results = {name: self._cache[key] for name, key in keys.items() if key in self._cache}
        # largest first, so that no process is left with a long job at the end
        missing = sorted(
            (n for n in molecules if n not in results), key=lambda name: -len(molecules[name])
        )
        jobs = ((self.method, settings, _bare(molecules[name]), self._timeout) for name in missing)
        problems = []
        done = workers.stream(_work, jobs, self._num_processes, on_death=_death_result)
        with _bar(label, len(molecules), len(results), self._progress and missing) as advance:
            for name, (result, is_reproducible) in zip(missing, done):
                results[name] = result
                if is_reproducible:
                    self._cache.add(keys[name], result)
                else:
                    problems.append(f"{name}: {result['error']}")
                    log.warning(
                        "%s: %s (not stored; the next run tries again)",
                        self.method.name,
                        problems[-1],
                    )
                advance()
        if problems and len(problems) == len(missing) and len(problems) == len(results):
            raise OracleError(
                f"{self.method.name} failed for all {len(problems)} molecules; the first "
                f"reason: {problems[0]}"
            )
        return {name: results[name] for name in molecules}


def _work(job) -> tuple[dict[str, Any], bool]:
    """Run a job.

    Returns:
      The result, serializable as JSON, and whether it is a property of the molecule and not of the
      circumstances. Only the former is cached.
    """
    begin = time.perf_counter()
    result, is_reproducible = _calculate(*job)
    return result | {"seconds": time.perf_counter() - begin}, is_reproducible


def _calculate(method, settings, atoms, timeout) -> tuple[dict[str, Any], bool]:
    """Return the result of a job without its duration, see `_work`."""
    try:
        with workers.deadline(timeout):
            return _evaluate(method, settings, atoms), True
    except CalculationFailed as error:
        return _FAILURE | {"error": _one_line(error)}, True
    except Exception as error:  # calculators raise anything; one molecule must not stop the others
        return _FAILURE | {"error": f"{type(error).__name__}: {_one_line(error)}"}, False


def _evaluate(method, settings, atoms) -> dict[str, Any]:
    """Return energy and forces of a molecule, after its relaxation if that is the job."""
    if not np.isfinite(atoms.positions).all():
        raise CalculationFailed("positions are not finite")
    atoms.calc = method.calculator(atoms)
    extra = minimize_atoms(atoms, settings) if settings["job"] == "minimize" else {}
    energy, forces = float(atoms.get_potential_energy()), atoms.get_forces()
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise CalculationFailed("energy or forces are not finite")
    return {"error": "", "energy": energy, "forces": forces.tolist(), **extra}


def _death_result(job) -> tuple[dict[str, Any], bool]:
    """Return the result of a job whose worker died."""
    return _FAILURE | {
        "error": "its worker process died (out of memory, a crash of the method's library, or the "
        "time limit)"
    }, False


def minimize_atoms(atoms, settings) -> dict[str, Any]:
    """Relax the atoms in place, and return the fields that `ReferenceRelaxation` adds."""
    from ase.optimize import BFGS

    optimizer = BFGS(atoms, logfile=None, maxstep=settings["maxstep"])
    converged = optimizer.run(fmax=settings["fmax"], steps=settings["max_steps"])
    return {
        "converged": bool(converged),
        "steps": int(optimizer.nsteps),
        "positions": atoms.positions.tolist(),
    }


def _state(atoms) -> tuple[int, int]:
    """Return the charge and the number of unpaired electrons."""
    charge = round(electronic_value(atoms, "charge"))
    unpaired = electronic_state(atoms).get("num_unpaired_electrons")
    return charge, int((atoms.numbers.sum() - charge) % 2 if unpaired is None else unpaired)


def _bare(atoms: Atoms) -> Atoms:
    """Return the atoms without calculator, constraints and arrays that no method uses."""
    return Atoms(
        atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=electronic_state(atoms)
    )


def _array(values) -> np.ndarray | None:
    """Return nested lists as an array (n_atoms, 3), and None as None."""
    return None if values is None else np.array(values, np.float64).reshape(-1, 3)


def _one_line(error: Exception) -> str:
    """Return the message of an exception on one line, or its type if there is none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _bar(label: str, total: int, done: int, shown) -> Iterator[Any]:
    """Show a progress bar and yield the function that advances it by one."""
    bar = Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
    with bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)
