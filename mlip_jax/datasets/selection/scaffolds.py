"""Bemis-Murcko scaffolds of molecules by RDKit: ring systems and the linkers between them.

Scaffolds omit chirality, isotopes and atom map numbers but keep formal charges. Explicit hydrogens,
as in the SMILES of SPICE, make no difference. Acyclic molecules have the scaffold "", as in
MoleculeNet. A split by scaffold assigns the largest groups to training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mlip_jax import workers
from mlip_jax.datasets.identity import group
from mlip_jax.datasets.isolation.molecules import is_safe_smiles
from mlip_jax.datasets.reader import DatasetError

log = logging.getLogger(__name__)

_CHUNK = 500  # molecules per job of a worker process, about 0.2 s
_LONG = 5_000  # minimum number of molecules for several processes and a progress bar


def murcko_scaffold(smiles: str) -> str:
    """Return the canonical SMILES of the scaffold, "" for an acyclic molecule.

    Raises:
      ImportError: RDKit is missing.
      DatasetError: RDKit cannot read the SMILES.
    """
    _require_rdkit()
    scaffold = _scaffold(smiles)
    if scaffold is None:
        raise DatasetError(f"RDKit cannot read the SMILES {smiles!r}")
    return scaffold


def scaffolds(
    smiles: Sequence[str] | np.ndarray,
    *,
    num_processes: int | None = None,
    progress: bool = True,
    on_error: str = "raise",
) -> np.ndarray:
    """Return the scaffold of each SMILES, (S,) str. Each distinct SMILES is processed once.

    For millions of structures, `scaffold_index` needs far less memory.

    Args:
      smiles: SMILES of the structures, (S,).
      num_processes: Number of worker processes. The default is one per available core for many
        molecules and one for few. Workers are fresh interpreters, so scripts need the usual
        `if __name__ == "__main__":`.
      progress: Whether to show a progress bar for many molecules.
      on_error: "raise" raises on an invalid SMILES, and "own" treats it as its own scaffold.

    Raises:
      ImportError: RDKit is missing.
      DatasetError: RDKit cannot read some SMILES. The message lists up to five of them.
    """
    names, index = scaffold_index(
        smiles, num_processes=num_processes, progress=progress, on_error=on_error
    )
    return names[index]


def scaffold_index(
    smiles: Sequence[str] | np.ndarray,
    *,
    num_processes: int | None = None,
    progress: bool = True,
    on_error: str = "raise",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct scaffolds, and the index among them for each SMILES, (S,) int32.

    Arguments and errors are those of `scaffolds`. A split by these indices equals the split by the
    scaffolds themselves.
    """
    if on_error not in ("raise", "own"):
        raise ValueError(f"on_error must be 'raise' or 'own', received {on_error!r}")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, received {num_processes}")
    _require_rdkit()
    smiles = np.array(smiles, object)
    # Process each distinct SMILES once: `number` is the index among them, (S,).
    number, count = group(smiles)
    one_of = np.zeros(count, np.int64)
    one_of[number] = np.arange(len(number))
    distinct = smiles[one_of].tolist()
    scaffold_of = _all_scaffolds(distinct, num_processes, progress)
    bad = [s for s, scaffold in zip(distinct, scaffold_of) if scaffold is None]
    if bad and on_error == "raise":
        raise DatasetError(
            f"RDKit cannot read {len(bad)} of {count} different SMILES: "
            f"{', '.join(repr(s) for s in bad[:5])}{', ...' if len(bad) > 5 else ''}. Remove these "
            "molecules, or treat each as its own scaffold (on_error='own')."
        )
    if bad:
        log.warning(
            "RDKit cannot read %d of %d different SMILES; each is its own scaffold", len(bad), count
        )
    names, index = np.unique(
        np.array([s if f is None else f for s, f in zip(distinct, scaffold_of)], object),
        return_inverse=True,
    )
    return names, index.astype(np.int32)[number]


def _all_scaffolds(
    smiles: list[str], num_processes: int | None, progress: bool
) -> list[str | None]:
    """Return the scaffold of each SMILES, None if RDKit cannot read it."""
    chunks = [smiles[start : start + _CHUNK] for start in range(0, len(smiles), _CHUNK)]
    if num_processes is None:
        num_processes = workers.available_cores() if len(smiles) >= _LONG else 1
    bar = Progress(
        TextColumn("scaffolds"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not progress or len(smiles) < _LONG,
    )
    with bar:
        task = bar.add_task("", total=len(smiles))
        parts: list[list[str | None]] = [[] for _ in chunks]
        for index, part in workers.run(_scaffolds_of, chunks, num_processes):
            parts[index] = part
            bar.advance(task, len(part))
        return [scaffold for part in parts for scaffold in part]


def _scaffolds_of(chunk: list[str]) -> list[str | None]:
    """Return the scaffolds of one job of a worker process."""
    return [_scaffold(smiles) for smiles in chunk]


def _scaffold(smiles: str) -> str | None:
    """Return the scaffold of a SMILES, or None if RDKit cannot read it."""
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds.MurckoScaffold import GetScaffoldForMol

    with rdBase.BlockLogs():
        try:
            molecule = Chem.MolFromSmiles(smiles) if is_safe_smiles(smiles) else None
            if molecule is None or not molecule.GetNumAtoms():
                return None
            for atom in molecule.GetAtoms():
                atom.SetAtomMapNum(0)
            # Write and read the SMILES again: hydrogens on mapped atoms become implicit, as in
            # other SMILES.
            molecule = Chem.MolFromSmiles(
                Chem.MolToSmiles(Chem.RemoveHs(molecule), isomericSmiles=False)
            )
            return Chem.MolToSmiles(GetScaffoldForMol(molecule), isomericSmiles=False)
        except (ValueError, RuntimeError):  # RDKit's violated invariants are RuntimeErrors
            return None


def _require_rdkit() -> None:
    """Raise ImportError if RDKit is missing."""
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        raise ImportError("scaffolds require RDKit: pip install 'mlip-flax[data]'") from error
