"""Models of this package and of others: training, latency, repeatability and roofline.

    python benchmarks/models.py all --home=DIR --pin=0          # everything
    python benchmarks/models.py all --home=DIR --pin=0 --quick  # PaiNN, SchNet, So3krates once
    python benchmarks/models.py train latency --home=DIR --only=painn --only=schnet
    python benchmarks/models.py roofline --home=DIR             # on a GPU: several batch sizes
    python benchmarks/models.py table --home=DIR                # tables of existing results

Parts: `environments` (one per package, in DIR), `data` (the workload), `train`, `latency`, `repeat`
(whether two processes give identical bits), `roofline`, `table`. Each measurement is a separate
process. The packages are measured in turn in every round, with the same allocator. If a measurement
fails, its row is omitted and the reason is printed. Results are lines of JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import environments, tables
from benchmarks.cases import OURS, Case, chosen, is_ours, is_peer
from benchmarks.machine import describe
from mlip_jax.cli.process import ALLOCATOR

PARTS = ("environments", "data", "train", "latency", "repeat", "roofline", "table")
DRIVERS = {
    OURS: ROOT / "benchmarks" / "ours.py",
    **{
        name: ROOT / "benchmarks" / "peers" / f"run_{file}.py"
        for name, file in (
            ("spk", "schnetpack"),
            ("tmd", "torchmdnet"),
            ("mace", "mace"),
            ("mlip", "mlip"),
            ("nequip", "nequip"),
            ("sevenn", "sevennet"),
            ("pyg", "pyg"),
            ("faenet", "faenet"),
        )
    },
}
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
BATCH, REPEAT_BATCH = 32, 8
SWEEP = (32, 64, 128, 256, 512, 1024)
TIME_LIMIT = 1200  # seconds for one process


class Effort(NamedTuple):
    """Extent of the measurements.

    Attributes:
      rounds: Number of rounds of all parts except latency.
      latency_rounds: Number of rounds of part latency.
      batches: Number of different batches per process.
      seconds: Minimum duration of a measurement of training steps in seconds.
      latency_seconds: Minimum duration per structure in part latency in seconds.
      conformations: Number of conformations per molecule of the workload.
      systems: Systems of part latency, see measure.SYSTEMS.
      counters: Whether to count FLOPs and bytes in the first round.
    """

    rounds: int
    latency_rounds: int
    batches: int
    seconds: float
    latency_seconds: float
    conformations: int
    systems: tuple[str, ...]
    counters: bool = True


FULL = Effort(3, 2, 4, 5.0, 2.0, 50, ("small", "medium", "cluster"))
QUICK = Effort(1, 1, 1, 1.0, 0.5, 8, ("small",))


class Job(NamedTuple):
    """Job of a measuring process.

    Attributes:
      part: "train", "latency", "repeat" or "device".
      model: Name of the model, see cases.Case.
      options: Options of the model, see cases.Case.
      work: File of the workload.
      batch: Number of structures per batch.
      batches: Number of batches.
      seconds: Duration of the measurement in seconds.
      systems: Systems of part latency.
      counters: Whether to count FLOPs and bytes, which requires another compilation.
    """

    part: str
    model: str
    options: Mapping[str, Any]
    work: str
    batch: int = BATCH
    batches: int = 1
    seconds: float = 1.0
    systems: tuple[str, ...] = ()
    counters: bool = False


class Runner:
    """Start measuring processes and save their results.

    Args:
      home: Folder of the environments.
      results: File to which lines are appended.
      pin: Core that every process is bound to, with one thread; None for all cores.
      tuned: Whether all processes use glibc's tuned allocator.
      drivers: Script by environment.
      time_limit: Time limit per process in seconds.
    """

    def __init__(
        self,
        home: Path,
        results: Path,
        pin: int | None,
        tuned: bool,
        drivers: Mapping[str, Path] = DRIVERS,
        time_limit: float = TIME_LIMIT,
    ):
        self._drivers, self._time_limit = drivers, time_limit
        self._home, self.results, self._pin, self._tuned = home, results, pin, tuned
        self._failed: set[tuple[str, str, int]] = set()
        self._machine = (
            describe(PACKAGES)
            + (f", only core {pin}" if pin is not None else "")
            + ("" if tuned else ", default allocator")
        )
        self.lines: list[tables.Line] = []

    def measure(self, case: Case, job: NamedTuple, part: str, number: int, **more) -> None:
        """Measure one case for `part` in round `number`, unless it has failed before."""
        if (part, case.name, job.batch) not in self._failed:
            self.keep(case, job, part, number, self.start(case, job) | more)

    def keep(
        self, case: Case, job: NamedTuple, part: str, number: int, result: tables.Line
    ) -> None:
        """Append a result to the file and print it, or print the reason of the failure."""
        line = {
            "part": part,
            "case": case.name,
            "round": number,
            "batch": job.batch,
            "machine": self._machine,
            "pin": self._pin,
            "tuned": self._tuned,
            **result,
        }
        self.lines.append(line)
        with open(self.results, "a") as file:
            file.write(json.dumps(line) + "\n")
        if "failed" in result:
            self._failed.add((part, case.name, job.batch))
            print(f"  {part} {case.name}: skipped, {result['failed']}", flush=True)
        else:
            print(f"  {part} {case.name}, round {number + 1}: {brief(line)}", flush=True)

    def start(self, case: Case, job: NamedTuple) -> tables.Line:
        """Run the process of a job and return its result, or {"failed": reason}."""
        python = (
            Path(sys.executable)
            if is_ours(case)
            else environments.python_of(self._home, case.environment)
        )
        if not python.exists():
            return {"failed": f"no environment {python.parents[1]}"}
        command = ["taskset", "-c", str(self._pin)] if self._pin is not None else []
        command += [
            str(python),
            "-W",
            "ignore",
            str(self._drivers[case.environment]),
            json.dumps(job._asdict()),
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=environment(self._pin, self._tuned),
                timeout=self._time_limit,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not finished after {self._time_limit} s"}
        if done.returncode:
            return {
                "failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[
                    -1
                ][:300]
            }
        try:
            return tables.last_result(done.stdout)
        except ValueError as error:
            return {"failed": str(error)}


def environment(pin: int | None, tuned: bool) -> dict[str, str]:
    """Return the environment variables of all measuring processes."""
    variables = dict(os.environ) | {"GLIBC_TUNABLES": ALLOCATOR if tuned else ""}
    variables.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if pin is not None:
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        variables |= dict.fromkeys(threads, "1")
        variables["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
        )
    return variables


def brief(line: tables.Line) -> str:
    """Return the main values of a result as text."""
    if "structures_per_s" in line:
        return (
            f"{line['structures_per_s']:.4g} structures/s, "
            f"{line['structures_per_cpu_s']:.4g} per CPU-second, "
            f"{line['peak_mib']:.0f} MiB, compiled in {line['compile_s']:.1f} s "
            f"({line['compile_cpu_s']:.1f} CPU-seconds)"
        )
    if "molecules_per_cpu_s" in line:
        return (
            f"{line['molecules_per_cpu_s']:.4g} molecules per CPU-second, "
            f"{line['cpu_ms_per_step']:.4g} ms per molecule-step, "
            f"{line['converged']} of {line['molecules']} converged"
        )
    if "systems" in line:
        return ", ".join(
            f"{s['atoms']} atoms {s['ms']['median']:.4g} ms" for s in line["systems"].values()
        )
    return ", ".join(f"{name} {value[:12]}" for name, value in line["hashes"].items())


class Work(NamedTuple):
    """Cases to measure, the file of the workload with its number of structures, and the extent."""

    cases: list[Case]
    path: str
    structures: int
    effort: Effort

    def training(self, case: Case, batch: int, counters: bool) -> Job:
        """Return the job of training steps with batches of `batch` structures."""
        count = max(1, min(self.effort.batches, self.structures // batch))
        return Job(
            "train",
            case.model,
            case.options,
            self.path,
            batch,
            count,
            self.effort.seconds,
            counters=counters and self.effort.counters,
        )

    def in_round(self, number: int) -> list[Case]:
        """Return the cases of a round; cases without a counterpart are only in the first one."""
        return [case for case in self.cases if number == 0 or is_ours(case) or is_peer(case)]

    def ours(self) -> list[Case]:
        """Return the models of this package."""
        return [case for case in self.cases if is_ours(case)]


def run_train(runner: Runner, work: Work, batch_sizes: list[int]) -> None:
    for number in range(work.effort.rounds):
        for batch in batch_sizes or [BATCH]:
            for case in work.in_round(number):
                runner.measure(
                    case, work.training(case, batch, counters=number == 0), "train", number
                )


def run_latency(runner: Runner, work: Work) -> None:
    effort = work.effort
    for number in range(effort.latency_rounds):
        for case in work.in_round(number):
            runner.measure(
                case,
                Job(
                    "latency",
                    case.model,
                    case.options,
                    work.path,
                    seconds=effort.latency_seconds,
                    systems=effort.systems,
                ),
                "latency",
                number,
            )


def run_repeat(runner: Runner, work: Work) -> None:
    for number in range(2):
        for case in work.ours():
            runner.measure(
                case,
                Job("repeat", case.model, case.options, work.path, REPEAT_BATCH),
                "repeat",
                number,
            )


def run_roofline(runner: Runner, work: Work, batch_sizes: list[int]) -> None:
    """Measure training steps of our models with counters, and the limits of the device.

    On a GPU, several batch sizes are measured. Results of part `train` of the same run are reused.
    """
    limits = runner.start(
        Case("device", OURS, "", {}), Job("device", "", {}, work.path, seconds=work.effort.seconds)
    )
    if "failed" in limits:
        print(f"  roofline: skipped, {limits['failed']}")
        return
    measured = {
        (line["case"], line["batch"]): line
        for line in runner.lines
        if line["part"] == "train" and line["round"] == 0 and "failed" not in line
    }
    for batch in batch_sizes or ([BATCH] if limits["device"] == "cpu" else list(SWEEP)):
        for case in work.ours():
            job, known = work.training(case, batch, counters=True), measured.get((case.name, batch))
            if known is None:
                runner.measure(case, job, "roofline", 0, limits=limits)
            else:
                runner.keep(
                    case, job, "roofline", 0, known | {"part": "roofline", "limits": limits}
                )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "all"))
    parser.add_argument(
        "--home", type=Path, required=True, help="folder of environments, data and results"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="text in the names of the cases; repeatable"
    )
    parser.add_argument(
        "--skip", action="append", default=[], help="text in the names of cases to leave out"
    )
    parser.add_argument(
        "--batch", type=_sizes, default=[], help="structures per batch, or several: 32,128,512"
    )
    parser.add_argument(
        "--pin", type=int, help="core that every process is bound to, with one thread"
    )
    parser.add_argument(
        "--untuned", action="store_true", help="use the default allocator for all packages"
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, help="number of rounds of all parts except repeat")
    parser.add_argument("--batches", type=int, help="number of different batches per process")
    parser.add_argument(
        "--conformations", type=int, help="conformations per molecule of the workload"
    )
    parser.add_argument(
        "--no_counters",
        action="store_true",
        help="do not count FLOPs and bytes, which compiles again",
    )
    parser.add_argument("--data", help="store or data file to use instead of the drugs")
    parser.add_argument(
        "--torch", default=environments.TORCH, help="version of PyTorch for other packages"
    )
    parser.add_argument(
        "--results", type=Path, help="file of the results; default: a new file in --home"
    )
    chosen_parts = parser.parse_args(arguments)
    if "all" in chosen_parts.parts:
        chosen_parts.parts = list(PARTS)
    return chosen_parts


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    arguments = parse()
    effort = QUICK if arguments.quick else FULL
    if arguments.rounds:
        effort = effort._replace(rounds=arguments.rounds, latency_rounds=arguments.rounds)
    for name in ("batches", "conformations"):
        if getattr(arguments, name):
            effort = effort._replace(**{name: getattr(arguments, name)})
    effort = effort._replace(counters=not arguments.no_counters)
    home, parts = arguments.home.resolve(), arguments.parts
    cases = chosen(arguments.only, arguments.quick)
    cases = [case for case in cases if not any(text in case.name for text in arguments.skip)]
    home.mkdir(parents=True, exist_ok=True)
    if parts == ["table"]:
        path = arguments.results or max(home.glob("results-*.jsonl"), default=None)
        if path is None:
            sys.exit(f"{home}: no results-*.jsonl. Run the measurements first.")
        print(tables.report(tables.read(path)))
        return
    if "environments" in parts:
        make_environments(home, cases, arguments.torch)
    if parts == ["environments"]:
        return
    runner = Runner(
        home,
        arguments.results or home / f"results-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl",
        arguments.pin,
        not arguments.untuned,
    )
    measure(runner, parts, prepare(home, cases, arguments.data, effort), arguments.batch)
    if runner.lines:
        print(f"\n{tables.report(runner.lines)}\n\n{runner.results}")


def prepare(home: Path, cases: list[Case], data: str | None, effort: Effort) -> Work:
    """Generate the workload, unless it exists."""
    from benchmarks.work import make_work

    path = make_work(home / "data", data, effort.conformations)
    with np.load(path) as file:
        return Work(cases, str(path), len(file["energy"]), effort)


def measure(runner: Runner, parts: list[str], work: Work, batch_sizes: list[int]) -> None:
    """Run the requested measurements."""
    if "train" in parts:
        run_train(runner, work, batch_sizes)
    if "latency" in parts:
        run_latency(runner, work)
    if "repeat" in parts:
        run_repeat(runner, work)
    if "roofline" in parts:
        run_roofline(runner, work, batch_sizes)


def make_environments(home: Path, cases: list[Case], torch: str) -> None:
    """Create the environments of the cases, and report those that cannot be created."""
    for name in dict.fromkeys(case.environment for case in cases if case.environment != OURS):
        problem = environments.make(home, name, torch)
        package = environments.ENVIRONMENTS[name].package
        print(f"environment v_{name}: {problem or package + ' is installed'}", flush=True)


if __name__ == "__main__":
    main()
