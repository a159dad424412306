"""Structures of the old domain: for replay, and for the test of what fine-tuning forgets."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
from pathlib import Path

import ml_collections
import numpy as np

from mlip_jax.datasets import atoms_list
from mlip_jax.datasets.builtin import geometries
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.unseen_elements import of_columns
from mlip_jax.files import make_subfolder
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.simulation.ensemble_mean import level_of_theory
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.structure import Structure
from mlip_jax.tasks.force_field_evaluation import data as evaluation_data
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

_FRAMES = 2  # generated conformations per molecule and round
_MAX_ROUNDS = 4
_GFN2 = "gfn2-xtb"


@dataclasses.dataclass(frozen=True)
class OldDomain:
    """Structures of the old domain.

    Attributes:
      replay: Structures with labels whose energies contain the reference energies of the initial
        force field; None if there are no structures.
      probe: Other structures, likewise.
      origin: Origin of the structures and labels, in words.
      is_labelled: Whether the labels of `probe` are those of the reference method. Otherwise they are
        predictions of the initial force field, so that errors are changes by fine-tuning.
    """

    replay: Columns | None
    probe: Columns | None
    origin: str
    is_labelled: bool = False

    @classmethod
    def create(
        cls,
        replay: Columns | None,
        probe: Columns | None,
        origin: str,
        initial: Potential,
        replace: bool = False,
    ) -> OldDomain:
        """Add the predictions of the initial force field where labels are missing.

        Args:
          replay, probe, origin: See the class.
          initial: Initial force field.
          replace: Whether to replace all labels of `replay`.
        """
        parts = {
            name: part
            for name, part in (("replay", replay), ("probe", probe))
            if part is not None and len(part)
        }
        is_labelled = "probe" in parts and bool(np.isfinite(parts["probe"].forces).any())
        if parts:
            columns = Columns.concatenate(list(parts.values()))
            missing = ~(np.isfinite(columns.energy) & _has_forces(columns))
            num_replay = len(parts.get("replay", ()))
            missing[:num_replay] |= replace
            # partial labels of the test are kept, because they are the truth
            missing[num_replay:] &= not is_labelled
            labelled = _with_labels(columns, missing, initial)
            parts = {
                name: labelled.take(rows)
                for name, rows in (
                    ("replay", np.arange(num_replay)),
                    ("probe", np.arange(num_replay, len(columns))),
                )
                if name in parts
            }
        return cls(parts.get("replay"), parts.get("probe"), origin, is_labelled)


def load(config: ml_collections.ConfigDict, initial: Potential, folder: Path) -> OldDomain:
    """Load or generate the structures of the old domain.

    Generated structures are kept in `folder` for a resumed run.

    Args:
      config: Config of task "fine_tune".
      initial: Initial force field.
      folder: Folder of the generated structures.

    Raises:
      DatasetError: The file of config.old.path cannot be read.
    """
    if config.old.path:
        return _from_file(config, initial)
    try:
        run = RunData.load(config.force_field)
    except (DatasetError, OSError):
        return _generate(config, initial, folder)
    return _from_run(config, run, initial)


def _from_file(config, initial: Potential) -> OldDomain:
    """Take the structures of config.old.path. Their labels, if any, are those of the old domain."""
    data = config.data.copy_and_resolve_references()
    data.unlock()
    data.path, data.reader, data.reader_options = config.old.path, "auto", ""
    data.elements = data.charge = None
    loaded = evaluation_data.from_config(data, config.seed)
    columns = _of_known_elements(loaded.rows.take(loaded.indices), initial)
    probe, replay = separate_probe(columns.molecule, config.seed)
    return OldDomain.create(
        columns.take(replay[: config.old.num_replay]),
        columns.take(probe[: config.old.num_probe]),
        f"structures of {Path(config.old.path).name}",
        initial,
    )


def separate_probe(
    molecule: np.ndarray, seed: int, parts: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the probe and of the other structures, in random order.

    The probe is a third of the molecules, because errors of replayed molecules would show too little
    forgetting. It is a third of the structures if there are fewer than three molecules.

    Args:
      molecule: Identity of the molecule of each structure, (S,).
      seed: Seed of the choice.
      parts: Divisor; 2 for halves in place of a third.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(molecule))
    names, group = np.unique(molecule.astype(str), return_inverse=True)
    if len(names) < parts:
        return rows[: len(rows) // parts], rows[len(rows) // parts :]
    in_probe = np.isin(group[rows], rng.permutation(len(names))[: len(names) // parts])
    return rows[in_probe], rows[~in_probe]


def _from_run(config, run: RunData, initial: Potential) -> OldDomain:
    """Take training structures of the run of the initial force field, and test structures."""
    rng = np.random.default_rng(config.seed)

    def some(rows: np.ndarray, count: int) -> Columns | None:
        rows = np.sort(rng.permutation(rows)[:count])
        return _of_known_elements(run.store.take(rows), initial) if len(rows) else None

    train = np.asarray(run.parts.get("train", []), np.int64)
    replay, probe = some(train, config.old.num_replay), some(test_rows(run), config.old.num_probe)
    origin = f"training and test structures of {run.workdir}, with their labels"
    return OldDomain.create(replay, probe, origin, initial)


def test_rows(run: RunData) -> np.ndarray:
    """Return the test structures of a run: those of molecules that occur in no other split, if any."""
    rows = np.asarray(run.parts.get("test", []), np.int64)
    unseen = np.intersect1d(rows, run.held_out())
    return unseen if len(unseen) else rows


def _generate(config, initial: Potential, folder: Path) -> OldDomain:
    """Generate conformations of built-in molecules inside the domain of the initial force field."""
    if importlib.util.find_spec("rdkit") is None:
        return OldDomain(None, None, "none: generating structures requires RDKit")
    labelled = (
        _GFN2 in level_of_theory(initial).lower() and importlib.util.find_spec("tblite") is not None
    )
    domain = atom_domain.of(config.force_field)
    charges = initial.metadata.get("statistics", {}).get("charges", [0.0])
    molecules = geometries.builtin_molecules(
        set(initial.elements), None if charges is None else {0.0, *charges}
    )
    order = np.random.default_rng(config.seed).permutation(len(molecules))
    num_test = len(order) // 4  # molecules of the probe, which are not replayed
    files = {name: folder / f"old_{name}.traj" for name in ("replay", "probe")}
    parts = {}
    for name, chosen, count in (
        ("probe", order[:num_test], config.old.num_probe),
        ("replay", order[num_test:], config.old.num_replay),
    ):
        if not files[name].exists() and len(chosen):
            structures = _sample(
                [molecules[k] for k in chosen],
                count,
                labelled and name == "probe",
                domain,
                initial,
                config,
            )
            if structures:
                make_subfolder(folder)
                atoms_list.write_trajectory(files[name], structures)
        parts[name] = _read(files[name])
    origin = "generated conformations of built-in molecules"
    origin += " inside the domain of the initial force field" if domain is not None else ""
    origin += ", with GFN2-xTB labels for the test" if labelled else ""
    return OldDomain.create(parts["replay"], parts["probe"], origin, initial, replace=True)


def _sample(
    molecules: list, count: int, labelled: bool, domain: Domain | None, initial, config
) -> list[Structure]:
    """Return up to `count` conformations inside the domain."""
    kept: list[Structure] = []
    start = time.monotonic()
    for number in range(_MAX_ROUNDS):
        # of some molecules more than needed, because some conformations are rejected
        needed = -(-(count - len(kept)) * 5 // (4 * _FRAMES))
        first = number * needed
        tasks = [
            geometries.GeometryTask(molecules[k % len(molecules)], _FRAMES, number, labelled)
            for k in range(first, first + needed)
        ]
        num_processes = config.old.num_processes or None
        sampled = [s for part in geometries.iterate_geometries(tasks, num_processes) for s in part]
        if sampled and domain is not None:
            columns = Columns.from_structures(sampled)
            inside = atom_domain.farthest(initial, domain, columns) <= 1
            sampled = [s for s, is_inside in zip(sampled, inside) if is_inside]
        kept += sampled
        if len(kept) >= count or not needed:
            break
    log.info(
        "old domain: generated %s in %.0f s",
        count_of(len(kept[:count]), "structure"),
        time.monotonic() - start,
    )
    return kept[:count]


def _read(path: Path) -> Columns | None:
    """Read structures that `atoms_list.write_trajectory` wrote."""
    from ase.io import read

    if not path.exists():
        return None
    frames = read(path, index=":", format="traj")
    structures, _ = atoms_list.from_atoms(frames, molecule_key="molecule")
    return Columns.from_structures(structures)


def _of_known_elements(columns: Columns, initial: Potential) -> Columns:
    """Return the structures whose elements the initial force field was trained on."""
    unseen = of_columns(columns, initial.elements)
    return columns.take(np.flatnonzero(unseen.known)) if len(unseen) else columns


def _has_forces(columns: Columns) -> np.ndarray:
    """Return whether all forces of a structure are known, (S,) bool."""
    return np.isfinite(np.add.reduceat(columns.forces.sum(1), columns.offsets[:-1]))


def _with_labels(columns: Columns, missing: np.ndarray, initial: Potential) -> Columns:
    """Return structures whose labels are predictions of the initial force field if `missing`."""
    if not missing.any():
        return columns
    energy, forces = energies_and_forces(initial, columns, np.arange(len(columns)))
    of_missing = np.repeat(missing, columns.n_atoms)[:, None]
    return dataclasses.replace(
        columns,
        energy=np.where(missing, energy, columns.energy),
        forces=np.where(of_missing, forces, columns.forces),
    )
