"""Task `relax`: relax the molecules or crystals of a file and write geometries and a report."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.config_input import count_input, read_input
from mlip_jax.datasets.molecules.files import fingerprint
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.potential import Potential
from mlip_jax.reports.molecules import Picture
from mlip_jax.reports.relaxation.report import write_relaxation_report
from mlip_jax.reports.relaxation.results import Relaxations, choose, read_results, reasons_by_count
from mlip_jax.reports.simulations.run_settings import run_settings
from mlip_jax.simulation.force_fields import load_domains, load_mean_force_field
from mlip_jax.simulation.relaxation import journal as relax_journal
from mlip_jax.simulation.relaxation import merge, outputs
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.inputs import close_records
from mlip_jax.simulation.relaxation.journal import Journal, Layout, check_any_succeeded
from mlip_jax.simulation.relaxation.outputs import CELL_LAYOUT, FRAME, LAYOUT, MOL_BLOCK, TRAJECTORY
from mlip_jax.simulation.relaxation.progress import RelaxationProgressBar
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.wording import count_of
from mlip_jax.workdir import check_origin, claimed

log = logging.getLogger(__name__)

_MAX_REASONS = 3  # reasons of failures in the log

FORMATS = {FRAME: "relaxed.xyz", MOL_BLOCK: "relaxed.sdf"}
TRAJECTORIES, RESULTS, PARTS, ORIGIN = "trajectories.xyz", "results.csv", "parts", "origin.json"


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Relax the molecules of `config`, or resume a run in `workdir`; return the path of the report.

    All processes of a run call this function. Each relaxes a share of the molecules, and the leader
    merges the results.

    Raises:
      ConfigError, WorkdirError, DatasetError, JournalError: The message explains how to fix the
        problem.
      RuntimeError: No molecule was relaxed. Table and report are written before.
    """
    config = configs.complete(config, defaults.relax_defaults())
    _check(config)
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config)))
            workdir = Path(workdir)
            total = count_input(config) * config.num_conformers  # geometries
            potential = load_mean_force_field(config.force_field)
            domains = load_domains(config.force_field)
            if distributed.leader():
                _check_origin(workdir / ORIGIN, config, potential)
        relaxer = _relaxer(config, potential)
        with distributed.report_end(
            "stopped; finished molecules are saved. Rerun the same command to resume."
        ):
            relax_share(config, workdir / PARTS, relaxer, total)
            distributed.barrier("relaxed")
            if not distributed.leader():
                return workdir / "report.html"
            return _finish(config, workdir, total, potential, domains)


def _check(c) -> None:
    for name, example in (("force_field", "runs/spice"), ("input", "molecules.smi")):
        if not c[name]:
            raise ConfigError(f"{name} is required, e.g. --config.{name}={example}")
    _cell_filter(c)


def _cell_filter(c) -> CellFilter | None:
    """Return the filter that relaxes the cells, or None.

    Raises:
      ConfigError: An option of it is invalid.
    """
    if c.cell is None:
        return None
    try:
        return CellFilter(
            c.cell, tuple(c.mask), c.scalar_pressure, c.hydrostatic_strain, c.constant_volume
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _layout(config) -> Layout:
    """Return the layout of the journal, which has further columns if cells are relaxed."""
    return LAYOUT if config.cell is None else CELL_LAYOUT


def _check_origin(path: Path, config, potential: Potential) -> None:
    """Raise WorkdirError if molecules or force field differ from those of the first start."""
    check_origin(
        path,
        {"input": fingerprint(config.input), "force_field": potential.digest()},
        "relaxations of other molecules or with another force field",
    )


def _relaxer(config, potential: Potential) -> Relaxer:
    return Relaxer(
        potential,
        optimizer=config.optimizer,
        fmax=config.fmax,
        max_steps=config.max_steps,
        maxstep=config.maxstep,
        dtype=config.dtype,
        batch_atoms=config.batch_atoms,
        trajectory_every=config.trajectory_every,
        devices=jax.local_devices(),
        cell=_cell_filter(config),
        symprec=config.symprec,
    )


def relax_share(config, folder: Path, relaxer, total: int) -> None:
    """Relax the molecules in the share of this process that no process has relaxed yet."""
    layout = _layout(config)
    with Journal(folder, distributed.index(), layout) as journal:
        done = relax_journal.finished(folder, layout)
        share = distributed.index(), distributed.count()
        mine = _share_size(total, config.num_conformers, *share)

        def is_mine(index: int) -> bool:
            return index // config.num_conformers % share[1] == share[0]

        before = sum(1 for index in range(total) if index in done and is_mine(index))
        failed = relax_journal.count_failures(folder, layout, is_mine)
        if before:
            log.info("resuming: %d of %d molecules are done", min(len(done), total), total)
        if before == mine:
            return
        records = read_input(
            config,
            num_conformers=config.num_conformers,
            skip=done,
            share=share,
            num_processes=config.num_processes or None,
        )
        with RelaxationProgressBar(mine, before, failed=failed) as progress:
            try:
                _stream(records, relaxer, journal, progress, MOL_BLOCK in config.formats)
            finally:
                close_records(records)
    log.info("compiled programs: %d", relaxer.num_compiles)


def _share_size(total: int, num_conformers: int, index: int, count: int) -> int:
    return len(range(index, total // num_conformers, count)) * num_conformers


def _stream(
    records: Iterator[MoleculeRecord],
    relaxer,
    journal: Journal,
    progress: RelaxationProgressBar,
    mol_blocks: bool,
) -> None:
    """Pass the records through the relaxer and write the results to the journal."""
    in_progress: dict[int, MoleculeRecord] = {}  # records that the relaxer has taken, by index

    def molecules():
        for record in records:
            if record.atoms is None:
                journal.add(outputs.failure_cells(record, journal.layout))
                progress.add(outputs.FAILED)
            else:
                in_progress[record.index] = record
                yield record.index, record.atoms

    journal.start_clock()
    with contextlib.closing(relaxer.stream(molecules())) as results:
        for index, result in results:
            record = in_progress.pop(index)
            journal.add(
                outputs.result_cells(record, result, journal.layout),
                outputs.pieces(record, result, mol_blocks),
            )
            progress.add(result.status)
    if in_progress:
        raise RuntimeError(
            f"{count_of(len(in_progress), 'molecule')} without a result, the first has index "
            f"{min(in_progress)}"
        )


def _finish(
    config, workdir: Path, total: int, potential: Potential, domains: tuple[Domain | None, ...]
) -> Path:
    """Merge the parts and write the report."""
    log.info("merging results")
    files = {kind: workdir / FORMATS[kind] for kind in config.formats}
    if config.trajectory_every:
        files[TRAJECTORY] = workdir / TRAJECTORIES
    seconds = merge.merge(
        workdir / PARTS,
        _layout(config),
        workdir / RESULTS,
        files,
        total,
        _domain_columns(potential, domains),
    )
    if MOL_BLOCK in files and not files[MOL_BLOCK].stat().st_size:
        files.pop(MOL_BLOCK).unlink()
        log.info("%s is not written: the bonds of the molecules are unknown", FORMATS[MOL_BLOCK])
    results = read_results(workdir / RESULTS)
    if len(results) != total:
        raise RuntimeError(
            f"{workdir / RESULTS}: contains {len(results)} of {total} molecules. Rerun the same "
            "command."
        )
    report = write_relaxation_report(
        workdir,
        results,
        title=f"Relaxation of {Path(config.input).name} with {Path(config.force_field).name}",
        seconds=seconds,
        info=run_settings(config, potential),
        pictures=_pictures(config, workdir / PARTS, results),
        files=[RESULTS, *(path.name for path in files.values())],
    )
    log.info(
        "%s: %d converged, %d at the step limit, %d diverged, %d failed",
        count_of(total, "molecule"),
        *(results.count(s) for s in ("converged", "step limit", "diverged", "failed")),
    )
    for (status, _), (count, example) in reasons_by_count(results)[:_MAX_REASONS]:
        log.warning("%s: %d, for example %s", status, count, example)
    if outside := int((results.outside == 1).sum()):
        log.warning(
            "%d of %d molecules are outside the domain of the force field, so their energies may "
            "be wrong; see the column outside_domain of %s",
            outside,
            total,
            workdir / RESULTS,
        )
    log.info("report: %s", report)
    check_any_succeeded(workdir / PARTS, _layout(config), total, workdir / RESULTS)
    return report


def _domain_columns(
    potential: Potential, domains: tuple[Domain | None, ...]
) -> merge.DerivedColumns:
    """Return the columns about the domain of the force field; cells are empty if it is unknown."""

    def cells(frames):
        return outputs.domain_cells(potential, domains, frames)

    return merge.DerivedColumns(outputs.DOMAIN_COLUMNS, FRAME, cells)


def _pictures(config, parts: Path, results: Relaxations) -> list[Picture]:
    """Return pictures of some molecules; their start geometries are read from the input again."""
    from ase.io import read

    chosen = choose(results, config.num_conformers)
    frames = merge.read_pieces(parts, _layout(config), FRAME, chosen)
    starts = read_input(
        config, num_conformers=config.num_conformers, skip=_AllExcept(chosen), num_processes=1
    )
    starts = {record.index: record for record in starts if record.atoms is not None}
    pictures = []
    for index in (i for i in chosen if i in starts and i in frames):
        after = read(io.StringIO(frames[index].decode()), format="extxyz")
        row = int(np.flatnonzero(results.index == index)[0])
        pictures.append(
            Picture(
                starts[index].display_name,
                starts[index].atoms,
                after,
                f"{-results.gained[row]:+.3g} eV in ".replace("-", "−")
                + f"{count_of(int(results.steps[row]), 'step')}\nRMSD {results.rmsd[row]:.2f} Å",
            )
        )
    return pictures


class _AllExcept:
    """Container of all integers except the given ones."""

    def __init__(self, kept):
        self._kept = frozenset(kept)

    def __contains__(self, index: int) -> bool:
        return index not in self._kept
