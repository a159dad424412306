"""Runner of a sweep: runs its variants one after another and writes their table.

Each variant runs in its own process and folder:

    runs/x/                workdir of the sweep
      sweep.csv, sweep.md  table; also sweep.png and sweep_seeds.csv
      NAME/                workdir of a variant, as of any run
        log.txt            output of its process, all attempts
        attempt.json       state of the last attempt
        done.json          exists if the variant is complete: its process ended with code 0

Several processes may run one sweep at the same time, on one machine or on several machines that
share the folder. Each process takes variants that no other process has started, or the variant
whose number it receives. The processes share nothing but the locks of the folders, so no scheduler
(submitit, Ray) is needed: the same command works in a shell, a job or a job array.
"""

from __future__ import annotations

import collections
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from rich.console import Console
from rich.table import Table

from mlip_jax import distributed
from mlip_jax.config import ConfigError
from mlip_jax.files import make_subfolder
from mlip_jax.reports.sweep import Row, cell, duration, read_scores, write_table
from mlip_jax.sweeps.attempts import VariantFolder, lock_folder
from mlip_jax.sweeps.child_process import SignalForwarder, run_logged
from mlip_jax.sweeps.overrides import to_text
from mlip_jax.sweeps.variants import SWEEP_FOLDER, Variant, differing, load, load_report
from mlip_jax.workdir import WorkdirError

log = logging.getLogger(__name__)

_POLL_SECONDS = 5.0  # time between checks of variants that other processes run first


def run(
    config_file: str,
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    arguments: Sequence[str],
    *,
    index: str | None = None,
    list_only: bool = False,
    collect_only: bool = False,
) -> int:
    """Run the variants of a sweep that are not complete.

    Args:
      config_file: Config file as given to --config.
      config: Config of that file with the changes from the command line.
      workdir: Workdir of the sweep.
      arguments: Arguments of the command line; a variant receives them before its own.
      index: Number of the only variant to run; "slurm" reads it from SLURM_ARRAY_TASK_ID. None runs
        all variants.
      list_only: Print the variants, one per line, and run nothing.
      collect_only: Write the table and run nothing.

    Returns:
      Exit code: 0, or 1 if a variant failed, or distributed.EXIT_REQUEUE if a variant was stopped
      and should be started again.

    Raises:
      ConfigError: Error of `variants.load`, or no variant has this number.
      WorkdirError: The folder belongs to a run, cannot be written, or another process is running
        the variant.
    """
    variants = load(config_file, config)
    _check_arguments(arguments, variants)
    chosen = variants if index is None else [variants[_parse_index(index, len(variants))]]
    if list_only:
        for number, variant in enumerate(variants):
            print(number, variant.name, to_text(variant.overrides), sep="\t")
        return 0
    environment = distributed.from_environment()
    if environment is not None and index is None and not collect_only:
        raise ConfigError(
            "a sweep runs its variants one after another, but this is one of several processes of "
            "a run. Add --sweep_index=NUMBER to run one variant on all of them, or start the sweep "
            "as a single process."
        )
    sweep = Sweep(
        Path(workdir),
        variants,
        differing(variants, config),
        list(arguments),
        f"Sweep of {Path(config_file.partition(':')[0]).name}",
        follower=environment is not None and _process_index(environment) > 0,
        report=load_report(config_file),
    )
    return sweep.collect() if collect_only else sweep.run(chosen)


def _check_arguments(arguments: Sequence[str], variants: Sequence[Variant]) -> None:
    """Raise ConfigError if variants of other config files would lose command-line fields."""
    fields = [a for a in arguments if a.lstrip("-").startswith(("config.", "overrides"))]
    foreign = [v.name for v in variants if v.config_file]
    if fields and foreign:
        raise ConfigError(
            f"{fields[0]}: not supported, because {len(foreign)} variants of this sweep, e.g. "
            f"{foreign[0]}, are of other config files with other fields. Change sweep() of the "
            "config file instead."
        )


def _process_index(environment: distributed.Environment) -> int:
    """Return the index of this process within its run; a TPU pod sets TPU_WORKER_ID."""
    return (
        int(os.environ.get("TPU_WORKER_ID", 0))
        if environment.process_id is None
        else environment.process_id
    )


def _parse_index(index: str, count: int) -> int:
    """Return the number of a variant from the command line or the Slurm environment."""
    text = os.environ.get("SLURM_ARRAY_TASK_ID") if index == "slurm" else index
    if text is None:
        raise ConfigError(
            "--sweep_index=slurm reads the number of the variant from SLURM_ARRAY_TASK_ID, which "
            "is not set. Start the sweep as a job array, or pass the number."
        )
    if not text.isdecimal() or int(text) >= count:
        raise ConfigError(
            f"--sweep_index: the variants are numbered from 0 to {count - 1}, received {text!r}. "
            "List them with --sweep --sweep_list."
        )
    return int(text)


class Sweep:
    """Sweep with its folder.

    Args:
      folder: Workdir of the sweep; created if missing.
      variants: All variants.
      values: Values per variant to show in its row of the table.
      arguments: Arguments of the command line.
      title: Title of the table.
      follower: Whether this process only takes part in variants that run on several processes.
        Another process then writes states, table and report.
      report: Function that writes a report about the folder at the end.
    """

    def __init__(
        self,
        folder: Path,
        variants: Sequence[Variant],
        values: Sequence[dict[str, Any]],
        arguments: Sequence[str],
        title: str,
        *,
        follower: bool = False,
        report: Callable[[Path], Any] | None = None,
    ):
        if (folder / "config.json").exists():
            raise WorkdirError(
                f"{folder}: the workdir of a single run. Choose another --workdir for the sweep."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkdirError(f"{folder}: cannot be written: {error}") from error
        self._folder, self._variants, self._values = folder, variants, values
        self._arguments, self._title, self._follower, self._report = (
            arguments,
            title,
            follower,
            report,
        )
        self._folders = {v.name: VariantFolder(folder / v.name, v) for v in variants}

    def run(self, chosen: Sequence[Variant]) -> int:
        """Run the incomplete variants among `chosen` and return the exit code of the sweep."""
        states: dict[str, str] = {}
        with SignalForwarder() as signals:
            queue, postponed = collections.deque(enumerate(chosen, 1)), 0
            while queue and not signals.received and "stopped" not in states.values():
                if postponed >= len(queue):  # all wait for other processes
                    time.sleep(_POLL_SECONDS)
                    postponed = 0
                number, variant = queue.popleft()
                later = [v for _, v in queue]
                state = self._take_turn(
                    variant, f"[{number}/{len(chosen)}] {variant.name}", later, signals
                )
                if state is None:
                    queue.append((number, variant))
                    postponed += 1
                else:
                    states[variant.name], postponed = state, 0
        self._show(chosen)
        self._write_report()
        missing = [
            v.name for v in chosen if states.get(v.name) not in ("done", "failed", "running")
        ]
        if missing:
            log.warning("stopped; rerun the same command to resume with %s", ", ".join(missing))
            return distributed.EXIT_REQUEUE
        if len(chosen) == 1 and "running" in states.values():
            raise WorkdirError(
                f"{self._folder / chosen[0].name}: another process is running this variant"
            )
        return int("failed" in states.values())

    def collect(self) -> int:
        """Write table and report, and return exit code 0."""
        self._write_table()
        self._show(self._variants)
        self._write_report()
        return 0

    def _take_turn(
        self, variant: Variant, label: str, later: Sequence[Variant], signals: SignalForwarder
    ) -> str | None:
        """Return the state of a variant after its turn, or None if it must wait.

        A variant waits while a variant that it needs is running or is among `later`.
        """
        missing = {
            name: state
            for name in variant.needs
            if (state := self._folders[name].state()) != "done"
        }
        if missing:
            if all(
                state == "running" or name in [v.name for v in later]
                for name, state in missing.items()
            ):
                return None  # this process or another process will run the needed variants
            if not self._follower:
                log.error("%s: requires %s first", label, ", ".join(missing))
            return "failed"
        state = self._run_variant(variant, label, signals)
        # Other variants may need one that another process runs. Check again: if that process ends
        # early, this process takes the variant over.
        needed = state == "running" and any(variant.name in v.needs for v in later)
        return None if needed else state

    def _run_variant(self, variant: Variant, label: str, signals: SignalForwarder) -> str:
        """Run a variant unless it is complete or another process runs it, and return its state."""
        folder = self._folders[variant.name]
        if self._follower:
            if folder.is_done():
                return "done"
            code = run_logged(self._command(variant), folder.log_of_process(os.getpid()), signals)
            return _state_after(code, signals)
        make_subfolder(folder.path)
        with lock_folder(folder.path, wait=False) as free:
            if not free:
                log.info("%s: another process is running it", label)
                return "running"
            if folder.is_done():
                self._write_table()
                log.info("%s: already done", label)
                return "done"
            before, start = folder.seconds(), time.monotonic()
            folder.record_attempt("running", before)
            self._write_table()
            log.info("%s: starting; log: %s", label, folder.log)
            code = run_logged(self._command(variant), folder.log, signals)
            state, seconds = _state_after(code, signals), before + time.monotonic() - start
            if state == "failed":
                folder.release_config()
            folder.record_attempt(state, seconds, code)
            self._write_table()
            log.info(
                "%s: %s after %s",
                label,
                state if state != "failed" else f"failed with exit code {code}",
                duration(seconds),
            )
        return state

    def _command(self, variant: Variant) -> list[str]:
        """Return the command that runs one variant; of repeated flags the last one counts."""
        arguments = list(self._arguments)
        if variant.config_file:
            arguments = _without_config(arguments) + [f"--config={variant.config_file}"]
        overrides = to_text(_insert_folder(variant.overrides, str(self._folder.absolute())))
        # Without -P, Python would import modules of the current folder in place of installed ones.
        safe = [] if os.path.samefile(Path(__file__).parents[2], ".") else ["-P"]
        return [
            *(sys.executable, *safe, "-m", "mlip_jax.main"),
            *arguments,
            "--nosweep",
            f"--workdir={self._folder / variant.name}",
            f"--overrides={overrides}",
        ]

    def _rows(self) -> list[Row]:
        """Return the rows of the table, with the current states and scores."""
        rows = []
        for variant, values in zip(self._variants, self._values):
            folder = self._folders[variant.name]
            state = folder.state()
            scores = read_scores(folder.path) if state == "done" else {}
            rows.append(Row(variant.name, values, state, folder.seconds() or None, scores))
        return rows

    def _write_table(self) -> None:
        """Write the table of all variants."""
        # Locked, so that the table written last is based on the states read last.
        with lock_folder(self._folder, wait=True):
            try:
                write_table(self._folder, self._rows(), self._title)
            except OSError as error:
                raise WorkdirError(
                    f"{self._folder}: the table cannot be written: {error}"
                ) from error

    def _write_report(self) -> None:
        if self._report is not None and not self._follower:
            print(f"report: {self._report(self._folder)}", flush=True)

    def _show(self, chosen: Sequence[Variant]) -> None:
        """Print the rows of `chosen` and the end of the log of each failed variant."""
        if self._follower:
            return
        names = {v.name for v in chosen}
        rows = [row for row in self._rows() if row.name in names]
        table = Table(
            "variant",
            *rows[0].values,
            "state",
            "time",
            "test energy MAE\nmeV/atom",
            "test force MAE\nmeV/Å",
        )
        for row in rows:
            errors = (
                row.scores.get(f"test_{k}")
                for k in ("energy_mae_mev_per_atom", "force_mae_mev_per_ang")
            )
            table.add_row(
                row.name,
                *map(cell, row.values.values()),
                row.state,
                duration(row.seconds),
                *("-" if e is None else f"{e:.2f}" for e in errors),
            )
        terminal = Console().is_terminal
        Console(width=None if terminal else 160).print(table)
        for row in rows:
            if row.state == "failed":
                folder = self._folders[row.name]
                print(f"\n{row.name} failed; last lines of {folder.log}:\n{folder.log_tail()}")
        print(f"\ntable: {self._folder / 'sweep.md'}", flush=True)


def _insert_folder(value: Any, folder: str) -> Any:
    """Replace {sweep} in the strings of a value with the folder of the sweep."""
    if isinstance(value, str):
        return value.replace(SWEEP_FOLDER, folder)
    if isinstance(value, Mapping):
        return {k: _insert_folder(v, folder) for k, v in value.items()}
    return (
        type(value)(_insert_folder(v, folder) for v in value)
        if isinstance(value, list | tuple)
        else value
    )


def _without_config(arguments: list[str]) -> list[str]:
    """Return the arguments of a command line without the config file and config fields."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_config = argument.startswith("-") and (name == "config" or name.startswith("config."))
        if not (is_config or skip):
            kept.append(argument)
        skip = is_config and not equals
    return kept


def _state_after(code: int, signals: SignalForwarder) -> str:
    """Return the state of a variant whose process ended with `code`."""
    if code == 0:
        return "done"
    return "stopped" if signals.received or code == distributed.EXIT_REQUEUE else "failed"
