"""Runs the variants of a sweep in turn, each in a process and a folder of its own, and keeps the table of them.

    runs/x/                the workdir of the sweep
      sweep.csv, sweep.md  the table; sweep.png, sweep_seeds.csv
      NAME/                the workdir of a variant, as of any run
        log.txt            what its process said, all starts
        attempt.json       how the last start went
        done.json          it is complete: it ended with code 0

Several processes may work on one sweep at once, on one machine or on several that share the folder: each takes
variants that no other has begun, or the one that it is told to.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from rich.console import Console
from rich.table import Table

from mlip_jax import config as configs
from mlip_jax import distributed
from mlip_jax.child import COMMAND, Stop, start
from mlip_jax.config import ConfigError
from mlip_jax.reports.sweep import Row, cell, duration, read_scores, write_table
from mlip_jax.sweep import SWEEP, Variant, differing, load, reporter, to_text
from mlip_jax.workdir import WorkdirError, write_json

log = logging.getLogger(__name__)

_POLL = 5.0  # seconds between two looks at what another process is to have done first
_TAIL = 15  # lines of a failed variant that are shown at the end
_OURS = ("log.txt", "attempt.json", "done.json", ".sweep.lock")


def run(config_file: str, config: ml_collections.ConfigDict, workdir: str | Path, arguments: Sequence[str], *,
        index: str | None = None, list_only: bool = False, collect_only: bool = False) -> int:
    """Run what is missing of a sweep.

    Args:
      config_file: As given to --config. config: Its config, with the changes of the command line.
      workdir: Of the sweep.
      arguments: Of the command line; those of a variant are these and its own.
      index: Run this variant alone; "slurm" takes the number from SLURM_ARRAY_TASK_ID. None: run all.
      list_only: Print the variants, one a line, and run nothing. collect_only: Make the table, and run nothing.

    Returns:
      Exit code: 0, 1 if a variant failed, or distributed.EXIT_REQUEUE if one was stopped and is to be started again.

    Raises:
      ConfigError: From the variants, see `sweep.load`, or there is no variant of that number.
      WorkdirError: The folder is that of a run, cannot be written, or another process is at work on the variant.
    """
    _refuse_lost_fields(arguments, variants := load(config_file, config))
    chosen = variants if index is None else [variants[_number(index, len(variants))]]
    if list_only:
        for number, variant in enumerate(variants):
            print(number, variant.name, to_text(variant.overrides), sep="\t")
        return 0
    environment = distributed.from_environment()
    if environment is not None and index is None and not collect_only:
        raise ConfigError("the variants of a sweep are run in turn, but the environment is that of one of several "
                          "processes of a run; give --sweep_index=NUMBER to run one variant on all of them, or "
                          "start the sweep as a single process")
    sweep = Sweep(Path(workdir), variants, differing(variants, config), list(arguments),
                  f"Sweep of {Path(config_file.partition(':')[0]).name}",
                  member=environment is not None and _process(environment) > 0, report=reporter(config_file))
    return sweep.collect() if collect_only else sweep.run(chosen)


def _refuse_lost_fields(arguments: Sequence[str], variants: Sequence[Variant]) -> None:
    """Raises ConfigError for fields of the command line that some variants would not have."""
    fields = [a for a in arguments if a.lstrip("-").startswith(("config.", "overrides"))]
    of_others = [v.name for v in variants if v.config_file]
    if fields and of_others:
        raise ConfigError(f"{fields[0]} cannot be given: {len(of_others)} variants of this sweep, the first "
                          f"{of_others[0]}, are of other config files, which have fields of their own. Change sweep() "
                          "of the config file")


def _process(environment: distributed.Environment) -> int:
    """Which process of a run this is; a TPU pod tells it by a variable of its own."""
    return int(os.environ.get("TPU_WORKER_ID", 0)) if environment.process_id is None else environment.process_id


def _number(index: str, count: int) -> int:
    text = os.environ.get("SLURM_ARRAY_TASK_ID") if index == "slurm" else index
    if text is None:
        raise ConfigError("--sweep_index=slurm takes the number of the variant from SLURM_ARRAY_TASK_ID, which is not "
                          "set; start it as a job array, or give the number")
    if not text.isdecimal() or int(text) >= count:
        raise ConfigError(f"the sweep has the variants 0 to {count - 1}; received the number {text!r}. --sweep "
                          "--sweep_list shows them")
    return int(text)


class Sweep:
    """A sweep in its folder.

    Args:
      folder: Made if missing.
      variants, values: What to run, and what of it goes into the table.
      arguments: Of the command line.
      title: Of the table.
      member: This process only runs its part of a variant on several processes; another one keeps the books.
      report: Makes a report of the folder, of what is done so far.
    """

    def __init__(self, folder: Path, variants: Sequence[Variant], values: Sequence[dict[str, Any]],
                 arguments: Sequence[str], title: str, member: bool = False,
                 report: Callable[[Path], Any] | None = None):
        if (folder / "config.json").exists():
            raise WorkdirError(f"{folder} is the folder of a run; give another --workdir for the sweep")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkdirError(f"{folder}: cannot be written: {error}") from error
        self._folder, self._variants, self._values = folder, variants, values
        self._arguments, self._title, self._member, self._report = arguments, title, member, report

    def run(self, chosen: Sequence[Variant]) -> int:
        """Run those of `chosen` that are not complete; returns the exit code of the sweep."""
        states: dict[str, str] = {}
        with Stop() as stop:
            waiting, postponed = collections.deque(enumerate(chosen, 1)), 0
            while waiting and not stop.received and "stopped" not in states.values():
                if postponed >= len(waiting):  # all of them wait for other processes
                    time.sleep(_POLL)
                    postponed = 0
                number, variant = waiting.popleft()
                state = self._next_state(variant, f"[{number}/{len(chosen)}] {variant.name}", waiting, stop)
                if state is None:
                    waiting.append((number, variant))
                    postponed += 1
                else:
                    states[variant.name], postponed = state, 0
        self._show(chosen)
        self._make_report()
        missing = [v.name for v in chosen if states.get(v.name) not in ("done", "failed", "running")]
        if missing:
            log.warning("stopped; the same command goes on with %s", ", ".join(missing))
            return distributed.EXIT_REQUEUE
        if len(chosen) == 1 and "running" in states.values():
            raise WorkdirError(f"{self._folder / chosen[0].name}: another process is at work on this variant")
        return int("failed" in states.values())

    def _next_state(self, variant: Variant, label: str, waiting, stop: Stop) -> str | None:
        """The state of a variant after its turn; None where it is to come again later."""
        behind = {v.name for _, v in waiting}
        missing = {name: state for name in variant.needs if (state := self._state_of(name)) != "done"}
        if missing:
            if all(state == "running" or name in behind for name, state in missing.items()):
                return None  # what it needs comes, here or in another process
            if not self._member:
                log.error("%s: needs %s first", label, ", ".join(missing))
            return "failed"
        state = self._one(variant, label, stop)
        # others need it: taken over here if the process that is at it ends
        needed = state == "running" and any(variant.name in v.needs for _, v in waiting)
        return None if needed else state

    def collect(self) -> int:
        """Make the table; returns 0."""
        self._write_table()
        self._show(self._variants)
        self._make_report()
        return 0

    def _state_of(self, name: str) -> str:
        return _state(self._folder / name, next(v for v in self._variants if v.name == name))

    def _make_report(self) -> None:
        if self._report is not None and not self._member:
            print(f"report: {self._report(self._folder)}", flush=True)

    def _one(self, variant: Variant, label: str, stop: Stop) -> str:
        """Run a variant, unless it is complete or another process is at it; returns its state."""
        workdir = self._folder / variant.name
        if self._member:
            if _is_done(workdir, variant):
                return "done"
            return _outcome(start(self._command(variant), _log_file(workdir, os.getpid()), stop), stop)
        workdir.mkdir(exist_ok=True)
        with _lock(workdir / ".sweep.lock", wait=False) as free:
            if not free:
                log.info("%s: another process is at work on it", label)
                return "running"
            if _is_done(workdir, variant):
                self._write_table()
                log.info("%s: done before", label)
                return "done"
            before = (_read(workdir / "attempt.json") or {}).get("seconds") or 0.0
            started = time.monotonic()
            self._note(workdir, variant, "running", seconds=before)
            log.info("%s: begins; log: %s", label, workdir / "log.txt")
            code = start(self._command(variant), _log_file(workdir), stop)
            state, seconds = _outcome(code, stop), before + time.monotonic() - started
            if state == "done":
                write_json(workdir / "done.json", {"name": variant.name, "overrides": to_text(variant.overrides),
                                                   "config": _identity(variant), "seconds": seconds})
            if state == "failed":
                _make_way(workdir)
            self._note(workdir, variant, state, seconds=seconds, code=code)
            log.info("%s: %s after %s", label, state if state != "failed" else f"failed with exit code {code}",
                     duration(seconds))
        return state

    def _note(self, workdir: Path, variant: Variant, state: str, **about) -> None:
        write_json(workdir / "attempt.json", {
            "state": state, "overrides": to_text(variant.overrides), "host": socket.gethostname(),
            "process": os.getpid(), **about})
        self._write_table()

    def _command(self, variant: Variant) -> list[str]:
        """The same command for one variant: of a flag that is given twice the later one counts."""
        arguments = list(self._arguments)
        if variant.config_file:
            arguments = _without_config(arguments) + [f"--config={variant.config_file}"]
        overrides = to_text(_placed(variant.overrides, str(self._folder.absolute())))
        return [sys.executable, "-m", "mlip_jax.main", *arguments, "--nosweep",
                f"--workdir={self._folder / variant.name}", f"--overrides={overrides}"]

    def _rows(self) -> list[Row]:
        rows = []
        for variant, values in zip(self._variants, self._values):
            workdir = self._folder / variant.name
            state, attempt = _state(workdir, variant), _read(workdir / "attempt.json") or {}
            scores = read_scores(workdir) if state == "done" else {}
            rows.append(Row(variant.name, values, state, attempt.get("seconds") or None, scores))
        return rows

    def _write_table(self) -> None:
        # locked, so that what is written last is what was read last
        with _lock(self._folder / ".sweep.lock", wait=True):
            try:
                write_table(self._folder, self._rows(), self._title)
            except OSError as error:
                raise WorkdirError(f"{self._folder}: the table cannot be written: {error}") from error

    def _show(self, chosen: Sequence[Variant]) -> None:
        if self._member:
            return
        names = {v.name for v in chosen}
        rows = [row for row in self._rows() if row.name in names]
        table = Table("variant", *rows[0].values, "state", "time", "test energy MAE\nmeV/atom", "test force MAE\nmeV/Å")
        for row in rows:
            errors = (row.scores.get(f"test_{k}") for k in ("energy_mae_mev_per_atom", "force_mae_mev_per_ang"))
            table.add_row(row.name, *map(cell, row.values.values()), row.state, duration(row.seconds),
                          *("-" if e is None else f"{e:.2f}" for e in errors))
        terminal = Console().is_terminal
        Console(width=None if terminal else 160).print(table)
        for row in rows:
            if row.state == "failed":
                path = self._folder / row.name / "log.txt"
                print(f"\n{row.name} failed; the last lines of {path}:\n{_tail(path)}")
        print(f"\ntable: {self._folder / 'sweep.md'}", flush=True)


def _placed(value: Any, folder: str) -> Any:
    """Values in which the folder of the sweep stands for {sweep}."""
    if isinstance(value, str):
        return value.replace(SWEEP, folder)
    if isinstance(value, Mapping):
        return {k: _placed(v, folder) for k, v in value.items()}
    return type(value)(_placed(v, folder) for v in value) if isinstance(value, list | tuple) else value


def _without_config(arguments: list[str]) -> list[str]:
    """Arguments of a command line without the config file and its fields."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        ours = argument.startswith("-") and (name == "config" or name.startswith("config."))
        if not (ours or skip):
            kept.append(argument)
        skip = ours and not equals
    return kept


def _outcome(code: int, stop: Stop) -> str:
    if code == 0:
        return "done"
    return "stopped" if stop.received or code == distributed.EXIT_REQUEUE else "failed"


def _state(workdir: Path, variant: Variant) -> str:
    """The state of a variant by what is in its folder."""
    attempt = _read(workdir / "attempt.json") or {"state": "waiting"}
    running = attempt["state"] == "running"
    if running and _alive(attempt):
        return "running"
    if _is_done(workdir, variant):
        return "done"
    if attempt["state"] == "done":  # but with another config
        return "waiting"
    return "stopped" if running else attempt["state"]


def _alive(attempt: dict[str, Any]) -> bool:
    """Whether the process of an attempt is there; of another machine's it is taken for granted."""
    if attempt["host"] != socket.gethostname():
        return True
    try:
        os.kill(attempt["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_done(workdir: Path, variant: Variant) -> bool:
    done = _read(workdir / "done.json")
    # as text, in which nan is the same as nan
    return done is not None and _text(done.get("config")) == _text(_identity(variant))


def _identity(variant: Variant) -> dict[str, Any]:
    return configs.identity(variant.config)


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirError(f"{path} is not valid JSON ({error}); delete it to run the variant again") from error


def _log_file(workdir: Path, member: int | None = None) -> Path:
    return workdir / ("log.txt" if member is None else f"log_{socket.gethostname()}_{member}.txt")


def _make_way(workdir: Path) -> None:
    """A variant that came to nothing, by a mistyped path for instance, leaves its folder to the corrected one."""
    if {p.name for p in workdir.iterdir()} <= {".lock", "config.json", *_OURS}:
        (workdir / "config.json").unlink(missing_ok=True)


def _tail(path: Path) -> str:
    """The last lines of the last start."""
    if not path.exists():
        return "(it is gone)"
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 20_000, 0))
        lines = file.read().decode("utf-8", "replace").splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith(COMMAND)), default=-1)
    lines = lines[last + 1:]
    return "\n".join([line.rstrip() for line in lines if line.strip()][-_TAIL:])


@contextlib.contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock of a file is had, after waiting for it if asked to; it goes with the process."""
    try:
        file = open(path, "a")
    except OSError as error:
        raise WorkdirError(f"{path.parent}: cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
