"""Speed and time breakdown of whole training runs, by batch size.

    python benchmarks/training.py FILE --home=DIR                # on a CPU: batch 8, 1,500 steps
    python benchmarks/training.py FILE --home=DIR --batch=32,128,512,2048  # on a GPU
    python benchmarks/training.py FILE --home=DIR --devices=1,2  # virtual devices on a CPU

Each measurement runs the command of a user, with configs/spice.py on FILE, in a separate process.
Rates are medians over the lines of the log except for the first ones. The utilization of a GPU is
measured with nvidia-smi during the run.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe, spread

PACKAGES = ("jax", "jaxlib", "flax", "optax", "e3x", "grain", "numpy")
WARM_UP = 3  # number of log lines that include compilation and filling of queues


class BusyShare:
    """Utilization of the GPU, measured each second; None without nvidia-smi."""

    def __init__(self):
        self._values, self._over = [], threading.Event()
        self._thread = None
        if shutil.which("nvidia-smi"):
            self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> BusyShare:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self._over.wait(1.0):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            self._values.append((time.time(), float(done.stdout.split()[0])))

    def between(self, begin: float, end: float) -> float | None:
        """Return the mean in percent between two times."""
        values = [v for t, v in self._values if begin <= t <= end]
        return statistics.mean(values) if values else None


def train(arguments, model: str, batch: int, devices: int, number: int) -> dict:
    """Run one training and return the values of its log and metrics."""
    workdir = Path(arguments.home) / f"{model}-{batch}-{devices}-{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    every = max(arguments.steps // 15, 1)
    command = [
        sys.executable,
        "-m",
        "mlip_jax.main",
        f"--config=configs/spice.py:{model}",
        f"--workdir={workdir}",
        f"--config.data.path={Path(arguments.file).resolve()}",
        f"--config.data.directory={arguments.home}/data",
        f"--config.train.num_steps={arguments.steps}",
        f"--config.train.batch_size={batch}",
        f"--config.train.log_every={every}",
        f"--config.train.valid_every={arguments.steps}",
        f"--config.train.checkpoint_every={5 * every}",
        "--config.train.max_valid=500",
        "--config.report.max_train=100",
        "--config.report.max_test=100",
        *arguments.more,
    ]
    environment = dict(os.environ, COLUMNS="500")
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    with BusyShare() as busy:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return read(workdir, done.stdout + done.stderr, busy)


def read(workdir: Path, log: str, busy: BusyShare) -> dict:
    """Return medians and fractions of a completed run."""
    with open(workdir / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["structures_per_second"]]
    rows = rows[min(WARM_UP, len(rows) - 1) :]
    seconds = float(rows[-1]["seconds"]) - float(rows[0]["seconds"])
    over = (workdir / "metrics.csv").stat().st_mtime
    folded = " ".join(log.split())
    shares = re.search(r"([\d.]+) % input, ([\d.]+) % checkpoint", folded)
    return {
        "structures": statistics.median(float(r["structures_per_second"]) for r in rows),
        "atoms": statistics.median(float(r["atoms_per_second"]) for r in rows),
        "edges": statistics.median(float(r["edges_per_second"]) for r in rows),
        "input": 100 * statistics.mean(float(r["input_share"]) for r in rows),
        "checkpoint": 100 * statistics.mean(float(r["checkpoint_share"]) for r in rows),
        "whole": (float(shares[1]), float(shares[2])),
        "padding": float(re.search(r"padding: .*?([\d.]+) % of edges", folded)[1]),
        "train": int(re.search(r"train: (\d+) structures", folded)[1]),
        "mfu": [100 * float(r["mfu"]) for r in rows if r["mfu"]],
        "busy": busy.between(over - seconds, over),
    }


def show(model: str, batch: int, devices: int, runs: list[dict]) -> str:
    """Return a row of the table."""

    def figures(name):
        return spread([r[name] for r in runs])

    rate = statistics.median(r["structures"] for r in runs)
    busy = [r["busy"] for r in runs if r["busy"] is not None]
    mfu = [statistics.median(r["mfu"]) for r in runs if r["mfu"]]
    hundred = 100 * runs[0]["train"] / rate / 60
    return " | ".join(
        (
            "",
            model,
            str(batch),
            str(devices),
            figures("structures"),
            figures("atoms"),
            figures("edges"),
            figures("input"),
            figures("checkpoint"),
            figures("padding"),
            spread(busy) if busy else "-",
            spread(mfu) if mfu else "-",
            f"{hundred:,.0f}",
            "",
        )
    ).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="data file or store")
    parser.add_argument("--home", required=True, help="folder of the runs")
    parser.add_argument("--models", default="so3krates,painn")
    parser.add_argument("--batch", default="8")
    parser.add_argument("--devices", default="1", help="virtual devices of a CPU")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("more", nargs="*", help="further flags of the command, after --")
    arguments = parser.parse_args()
    cases = [
        (m, int(b), int(d))
        for m in arguments.models.split(",")
        for b in arguments.batch.split(",")
        for d in arguments.devices.split(",")
    ]
    runs = {case: [] for case in cases}
    for number in range(arguments.rounds):
        for case in cases:
            runs[case].append(train(arguments, *case, number))
            print(f"round {number}: {case}: {runs[case][-1]}", file=sys.stderr, flush=True)
    print(f"{describe(PACKAGES)}\n")
    print(
        "| model | batch | devices | structures/s | atoms/s | edges/s | waiting for input, % | "
        "checkpoints, % | padding edges, % | GPU utilization, % | MFU, % | minutes/100 epochs |\n|"
        + "---|"
        * 12
    )
    for case in cases:
        print(show(*case, runs[case]))


if __name__ == "__main__":
    main()
