"""Generator of the built-in data set: small molecules with GFN2-xTB energies and gradients.

The file is in the layout of SPICE and is read by the reader of SPICE. Worker processes generate one
molecule at a time, and each result is saved before the next one is processed, so an interrupted run
can be resumed.
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
from mlip_jax.datasets.builtin import kinds as geometry_kinds
from mlip_jax.datasets.builtin import molecules as embedded
from mlip_jax.datasets.builtin.conformations import Conformations, Task, make_conformations

log = logging.getLogger(__name__)

# Incremented whenever the same parameters would result in different geometries, so that files of
# older versions are regenerated.
SAMPLING_VERSION = 1


def generate_embedded(
    path: str | Path,
    *,
    num_conformations: int = 8000,
    seed: int = 0,
    num_processes: int | None = None,
    molecules: Sequence[embedded.Molecule] | None = None,
    kinds: Sequence[str] = (geometry_kinds.CONFORMATIONS,),
    progress: bool = True,
) -> Path:
    """Generate the built-in data set unless it exists.

    The content depends on the arguments and on the versions of RDKit, tblite and NumPy. It does not
    depend on the number of processes or on interruptions. Worker processes are fresh interpreters,
    so scripts that call this function need the usual `if __name__ == '__main__':`.

    Args:
      path: Path of the HDF5 file. An existing file is returned if its parameters are the same, and
        replaced if this function generated it with other parameters.
      num_conformations: Number of conformations to sample over all molecules. Conformations with
        broken bonds, without convergence or with forces above 25 eV/Å are dropped, so the file may
        contain slightly fewer.
      seed: Seed of the sampling.
      num_processes: Number of worker processes; None for one per available core.
      molecules: Molecules as (name, SMILES, subset); None for the built-in ones.
      kinds: Kinds of geometries: "conformations" (thermal), "torsions" (bonds turned to any angle),
        "dimers" (pairs of molecules of the list) and "stretches" (normal modes and stretched bonds
        of molecules of 2 to 12 atoms).
      progress: Whether to show a progress bar.

    Returns:
      Path of the file.

    Raises:
      ImportError: RDKit or tblite is missing.
      ValueError: A SMILES is invalid, a name is invalid or used twice, a count is below one, or a kind
        is unknown or has no molecule.
      FileExistsError: A file that this function did not generate exists at `path`.
      OSError: The disk is full or the folder is not writable. No partial file remains.
    """
    require("rdkit", "tblite")
    from mlip_jax.datasets.builtin import storage

    path = Path(path)
    molecules = (
        embedded.embedded_molecules()
        if molecules is None
        else [embedded.Molecule(*each) for each in molecules]
    )
    num_processes = workers.available_cores() if num_processes is None else num_processes
    if num_conformations < 1 or num_processes < 1:
        raise ValueError(
            f"expected at least one conformation and process, got {num_conformations=}, "
            f"{num_processes=}"
        )
    jobs = geometry_kinds.jobs(molecules, kinds, seed)
    listed, molecules = molecules, [job.molecule for job in jobs]
    counts, costs = allocate_conformations(molecules, num_conformations)
    parameters = {
        "num_conformations": num_conformations,
        "seed": seed,
        "sampling_version": SAMPLING_VERSION,
        "molecules": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
    }
    if tuple(kinds) != (geometry_kinds.CONFORMATIONS,):
        parameters["kinds"] = list(kinds)
    if is_cached(path, parameters):
        return path
    versions = {name: version(name) for name in ("rdkit", "tblite", "numpy")}
    with storage.Parts(path, parameters | versions) as parts:
        if is_cached(path, parameters):  # another process may have written it
            return path
        with progress_bar(progress, counts) as advance:
            tasks = [Task(job.molecule, count, seed, job.kind) for job, count in zip(jobs, counts)]
            make_parts(parts, make_conformations, tasks, costs, num_processes, advance)
        parts.merge(molecules, counts, parameters | {"versions": versions})
    return path


def require(*packages: str) -> None:
    """Raise ImportError if one of the packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the built-in data set requires {' and '.join(missing)}: pip install 'mlip-flax[data]'"
        )


def is_cached(path: Path, parameters: dict[str, Any]) -> bool:
    """Return whether a file with these parameters exists. Warn if it has other parameters.

    Raises:
      FileExistsError: A file exists that was not generated by this package.
    """
    from mlip_jax.datasets.builtin import storage

    stored = storage.stored_parameters(path)
    if stored is None:
        return False
    stored.pop("versions", None)
    if stored != parameters:
        log.warning(
            "%s was generated with other settings (%s); regenerating it with %s",
            path,
            stored,
            parameters,
        )
    return stored == parameters


def allocate_conformations(
    molecules: Sequence[embedded.Molecule], num_conformations: int
) -> tuple[list[int], list[float]]:
    """Distribute conformations over molecules, with somewhat more for large and flexible ones.

    Args:
      molecules: Molecules.
      num_conformations: Total number of conformations.

    Returns:
      Number of conformations per molecule, and cost of one conformation in arbitrary units.

    Raises:
      ValueError: Some SMILES are invalid, or some names are not valid or not unique as names of
        HDF5 groups. The message lists all of them.
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
        # Large and flexible molecules have more distinct conformations.
        weights.append(12 + size / 2 + 2 * CalcNumRotatableBonds(mol))
        costs.append(size**2.0)
    if problems or not molecules:
        raise ValueError("unusable molecules: " + ("; ".join(problems) or "the list is empty"))
    # Rounding the cumulative sum, not each share, keeps the total exact.
    ends = np.rint(num_conformations * np.cumsum(weights) / np.sum(weights)).astype(int)
    return np.diff(ends, prepend=0).tolist(), costs


def make_parts(
    parts: Any,
    function: Callable[[Any], Conformations],
    tasks: Sequence[Any],
    costs: Sequence[float],
    num_processes: int,
    advance: Callable[[int], None],
) -> None:
    """Generate the missing parts in worker processes and save each one as it is finished.

    Args:
      parts: Open storage.Parts.
      function: Function that generates the part of a task in a worker process.
      tasks: One task per part, with the fields `molecule` and `count`. Tasks with count 0 are
        skipped.
      costs: Cost of one conformation of each task, in arbitrary units.
      num_processes: Number of worker processes.
      advance: Function that is called with the count of each finished part, for a progress bar.
    """
    missing = []
    for index, task in enumerate(tasks):
        part = parts.load(index) if task.count else None
        if part is not None:
            advance(task.count)
        elif task.count:
            missing.append(index)
    # Nothing to do: do not start worker processes.
    if not missing:
        return
    # Longest tasks first, so that no process runs a long one at the end while the others are idle.
    missing.sort(key=lambda index: -tasks[index].count * costs[index])
    for position, part in workers.run(
        function,
        [tasks[index] for index in missing],
        num_processes,
        initializer=quiet_rdkit,
        single_inline=False,
    ):
        task = tasks[missing[position]]
        parts.save(missing[position], part)
        advance(task.count)
        if not len(part.energies):
            log.warning("%s: no usable conformation (%s)", task.molecule.name, part.dropped)


def quiet_rdkit():
    """Disable the messages of RDKit on the console."""
    from rdkit import RDLogger

    RDLogger.DisableLog("rdApp.*")


@contextlib.contextmanager
def progress_bar(shown: bool, counts: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of conformations of each finished molecule."""
    bar = bars.Progress(
        bars.TextColumn("GFN2-xTB"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[molecules]}/{task.fields[of]} molecules"),
        bars.TextColumn("{task.completed:.0f}/{task.total:.0f} conformations"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        disable=not shown,
    )
    with bar:
        task = bar.add_task(
            "", total=sum(counts), molecules=0, of=sum(count > 0 for count in counts)
        )

        def advance(conformations):
            bar.update(task, advance=conformations, molecules=bar.tasks[0].fields["molecules"] + 1)

        yield advance
