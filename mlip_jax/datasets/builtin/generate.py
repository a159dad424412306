"""Makes the embedded data set: conformations of small molecules with GFN2-xTB energies and gradients.

The file is in the layout of SPICE, so whatever reads SPICE reads it. Molecules go out to worker processes one at a
time; what comes back is on disk before the next one, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich import progress as bars

from mlip_jax import workers
from mlip_jax.datasets.builtin import molecules as embedded
from mlip_jax.datasets.builtin.conformations import Conformations, Task, make_conformations

log = logging.getLogger(__name__)

# Goes up whenever the same parameters would give other geometries, so that an old file is not taken for a new one.
SAMPLING_VERSION = 1


def generate_embedded(
    path: str | Path,
    *,
    num_conformations: int = 8000,
    seed: int = 0,
    num_processes: int | None = None,
    molecules: Sequence[embedded.Molecule] | None = None,
    progress: bool = True,
) -> Path:
    """Makes the embedded data set, unless it is there already.

    The content depends on the arguments and on the versions of RDKit, tblite and numpy, but neither on the number of
    processes nor on interruptions. A script that calls this needs the usual `if __name__ == '__main__':`, since the
    worker processes are fresh interpreters.

    Args:
      path: the HDF5 file. A file there that was made with the same parameters is returned at once; one that
          was made by this function with others is replaced.
      num_conformations: how many conformations to sample over all molecules. Those that are torn apart,
          do not converge or have forces above 25 eV/Å are dropped, so the file may hold a few less.
      seed: of the sampling.
      num_processes: worker processes; None for one per core that this process may use.
      molecules: sequence of :class:`Molecule`, (name, SMILES, subset); None for the built-in ones.
      progress: whether to show a progress bar.

    Returns:
      Path of the file.

    Raises:
      ImportError: if RDKit or tblite is missing.
      ValueError: for SMILES that do not parse, names used twice, or counts below one.
      FileExistsError: if another file, not made by this function, is at path.
      OSError: if the disk is full or the folder cannot be written to. Nothing half-written is left.
    """
    require("rdkit", "tblite")
    from mlip_jax.datasets.builtin import storage

    path = Path(path)
    molecules = embedded.embedded_molecules() if molecules is None else [embedded.Molecule(*each) for each in molecules]
    num_processes = workers.available_cores() if num_processes is None else num_processes
    if num_conformations < 1 or num_processes < 1:
        raise ValueError(f"expected at least one conformation and process, got {num_conformations=}, {num_processes=}")
    counts, costs = share_out(molecules, num_conformations)
    parameters = {"num_conformations": num_conformations, "seed": seed, "sampling_version": SAMPLING_VERSION,
                  "molecules": hashlib.sha256(json.dumps(molecules).encode()).hexdigest()}
    if is_cached(path, parameters):
        return path
    versions = {name: version(name) for name in ("rdkit", "tblite", "numpy")}
    with storage.Parts(path, parameters | versions) as parts:
        if is_cached(path, parameters):  # made by another process in the meantime
            return path
        with progress_bar(progress, counts) as advance:
            tasks = [Task(molecule, count, seed) for molecule, count in zip(molecules, counts)]
            make_parts(parts, make_conformations, tasks, costs, num_processes, advance)
        parts.merge(molecules, counts, parameters | {"versions": versions})
    log.info("%s: %s", path, storage.summarize(path))
    return path


def require(*packages: str) -> None:
    """Raise ImportError where one of the packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the embedded data set needs {' and '.join(missing)}: pip install 'mlip-flax[data]'")


def is_cached(path: Path, parameters: dict[str, Any]) -> bool:
    """Whether there is a file at `path` that was made with these parameters; warns of one of others.

    Raises:
      FileExistsError: A file is there that was not made here.
    """
    from mlip_jax.datasets.builtin import storage

    stored = storage.stored_parameters(path)
    if stored is None:
        return False
    stored.pop("versions", None)
    if stored != parameters:
        log.warning("%s was made with %s and will be replaced by one of %s", path, stored, parameters)
    return stored == parameters


def share_out(molecules: Sequence[embedded.Molecule], num_conformations: int) -> tuple[list[int], list[float]]:
    """How many conformations each molecule gets: large and flexible ones somewhat more.

    Args:
      molecules: sequence of :class:`Molecule`.
      num_conformations: their total.

    Returns:
      Conformations per molecule, list of int, and what one costs, list of float in arbitrary units.

    Raises:
      ValueError: naming every molecule whose SMILES does not parse or whose name cannot be a group of its own.
    """
    from rdkit import Chem, RDLogger
    from rdkit.Chem.rdMolDescriptors import CalcNumRotatableBonds

    RDLogger.DisableLog("rdApp.*")
    problems, names, weights, costs = [], set(), [], []
    for molecule in molecules:
        if not molecule.name or "/" in molecule.name or molecule.name in names:
            problems.append(f'{molecule.name!r} is empty, contains "/" or is used twice')
        names.add(molecule.name)
        mol = Chem.MolFromSmiles(molecule.smiles)
        if mol is None or not mol.GetNumAtoms():
            problems.append(f"{molecule.name!r} has no valid SMILES: {molecule.smiles!r}")
            continue
        size = Chem.AddHs(mol).GetNumAtoms()
        weights.append(12 + size / 2 + 2 * CalcNumRotatableBonds(mol))
        costs.append(size**2.0)
    if problems or not molecules:
        raise ValueError("molecules that cannot be used: " + ("; ".join(problems) or "the list is empty"))
    # Rounding the running total, and not each share, keeps the total exact.
    ends = np.rint(num_conformations * np.cumsum(weights) / np.sum(weights)).astype(int)
    return np.diff(ends, prepend=0).tolist(), costs


def make_parts(parts: Any, function: Callable[[Any], Conformations], tasks: Sequence[Any], costs: Sequence[float],
               num_processes: int, advance: Callable[[int], None]) -> None:
    """Makes every part that is not on disk yet, each on disk before the next one is taken.

    Args:
      parts: storage.Parts, open. function: Makes the part of a task in a worker process.
      tasks: One for each part, with the fields `molecule` and `count`; nothing is made where the count is 0.
      costs: Of one conformation, in any unit. advance: Told the count of every part that is there.
    """
    waiting = []
    for index, task in enumerate(tasks):
        part = parts.load(index) if task.count else None
        if part is not None:
            advance(task.count)
        elif task.count:
            waiting.append(index)
    if not waiting:
        return
    # The longest first, so that no process is left alone with one at the end.
    waiting.sort(key=lambda index: -tasks[index].count * costs[index])
    for done, part in workers.run(function, [tasks[index] for index in waiting], num_processes,
                                  initializer=quiet_rdkit, one_stays_here=False):
        task = tasks[waiting[done]]
        parts.save(waiting[done], part)
        advance(task.count)
        if not len(part.energies):
            log.warning("no conformation of %s: %s", task.molecule.name, part.dropped)


def quiet_rdkit():
    """No messages of RDKit on the console."""
    from rdkit import RDLogger

    RDLogger.DisableLog("rdApp.*")


@contextlib.contextmanager
def progress_bar(shown: bool, counts: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of conformations of every finished molecule."""
    bar = bars.Progress(
        bars.TextColumn("GFN2-xTB"), bars.BarColumn(),
        bars.TextColumn("{task.fields[molecules]}/{task.fields[of]} molecules"),
        bars.TextColumn("{task.completed:.0f}/{task.total:.0f} conformations"),
        bars.TimeElapsedColumn(), bars.TimeRemainingColumn(), disable=not shown,
    )
    with bar:
        task = bar.add_task("", total=sum(counts), molecules=0, of=sum(count > 0 for count in counts))

        def advance(conformations):
            bar.update(task, advance=conformations, molecules=bar.tasks[0].fields["molecules"] + 1)

        yield advance
