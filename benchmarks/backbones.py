"""Train the nine models of Force2Geo's comparison (Table 2) on one data set with one budget.

    python benchmarks/off_equilibrium.py trajectories.lmdb MORE.lmdb --frames=8 --keep_every=5
    python benchmarks/backbones.py MORE.lmdb runs/backbones --updates=200 --minutes=6

Each model is trained twice with `configs/pubchemqcr.py:small,MODEL`: for a number of updates that
all models share, and for as many updates as take a number of CPU minutes, without compilation. The
CPU time of an update is the median over the log lines of the first training. Errors are those of
the test split, which has other molecules than the training data. If interrupted, rerun the same
command to resume. Pin the process to one core (`taskset -c 1`), so that CPU time is the time of a
core. Linux only.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Published: energy MAE (meV/atom), force RMSE (meV/Å), minutes per epoch (Force2Geo, Table 2).
PUBLISHED = {
    "schnet": (5.30, 56.55, 25),
    "painn_oc": (5.13, 46.34, 26),
    "nequip": (7.37, 54.78, 130),
    "sevennet": (8.77, 47.63, 150),
    "allegro": (10.86, 60.71, 85),
    "faenet": (7.28, 60.24, 16),
    "mace": (7.54, 51.46, 120),
    "pace": (6.24, 50.54, 140),
    "equiformer": (4.69, 34.67, 65),
}
LOG_LINES = 10  # of a training


def train(model: str, steps: int, workdir: Path, a: argparse.Namespace) -> float:
    """Train a model unless it has been trained, and return the CPU time of an update (s)."""
    record = workdir / "cpu.json"
    if record.exists():
        return json.loads(record.read_text())["seconds_per_update"]
    options = {
        "data.path": a.data,
        "data.reader_options": a.reader_options,
        "train.num_steps": steps,
        "train.batch_size": a.batch_size,
        "train.valid_every": steps,
        "train.checkpoint_every": steps,
        "train.log_every": max(1, steps // LOG_LINES),
        "train.max_valid": 50,
        "report.max_train": 20,
        "report.max_test": a.max_test,
        "optimizer.warmup_steps": max(1, steps // 20),
    }
    if a.learning_rate:
        options["optimizer.learning_rate"] = a.learning_rate
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlip_jax.main"]
    command += [f"--config={ROOT}/configs/pubchemqcr.py:small,{model}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in options.items()]
    with open(workdir.with_suffix(".log"), "a") as log:
        seconds = run_timed(command, log)
    record.write_text(json.dumps({"seconds_per_update": seconds, "steps": steps}))
    return seconds


def run_timed(command: list[str], log) -> float:
    """Run a training, copy its output to `log` and return the CPU time of an update (s)."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"NO_COLOR": ""},
    )
    logged = []  # (update, CPU time so far)
    for line in process.stdout:
        log.write(line)
        log.flush()
        if update := re.search(r"INFO +step (\d+)/", line):
            logged.append((int(update[1]), cpu_seconds(process.pid)))
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return statistics.median((t2 - t1) / (k2 - k1) for (k1, t1), (k2, t2) in pairwise(logged))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far (s)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def errors(workdir: Path) -> tuple[float, float]:
    """Return the test errors: energy MAE (meV/atom) and force RMSE (meV/Å)."""
    test = json.loads((workdir / "metrics.json").read_text())["test"]
    return test["energy_mae_mev_per_atom"], test["force_rmse_mev_per_ang"]


def row(model: str, a: argparse.Namespace) -> str:
    """Train a model with both budgets and return its row of the table."""
    folder = Path(a.output).resolve()
    cost = train(model, a.updates, folder / f"{model}_updates", a)
    cells = [f"{1e3 * cost / a.batch_size:.1f}"]
    budgets = (("updates", a.updates), ("minutes", max(LOG_LINES, int(60 * a.minutes / cost))))
    for name, steps in budgets:
        workdir = folder / f"{model}_{name}"
        train(model, steps, workdir, a)
        energy, force = errors(workdir)
        cells += [f"{steps:,}", f"{energy:.1f}", f"{force:.0f}"]
    cells += [f"{x:g}" for x in PUBLISHED[model]]
    return f"| {model} | " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="trajectories in PubChemQCR's layout")
    parser.add_argument("output", help="folder of the runs")
    parser.add_argument(
        "--reader_options", default="stages=('DFT_1st','DFT_2nd'); level_of_theory=GFN2-xTB"
    )
    parser.add_argument("--models", default=",".join(PUBLISHED), help="names, separated by commas")
    parser.add_argument("--updates", type=int, default=200, help="updates of the first budget")
    parser.add_argument("--minutes", type=float, default=6.0, help="CPU minutes of the second one")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, help="default: that of the config")
    parser.add_argument("--max_test", type=int, default=1_000, help="structures of the test split")
    a = parser.parse_args()
    a.data = str(Path(a.data).resolve())
    print(
        "| model | CPU ms per structure | updates | energy meV/atom | force RMSE meV/Å | updates in "
        f"{a.minutes:g} min | energy | force | published energy | force | min per epoch |\n|"
        + "---|"
        * 11
    )
    for model in a.models.split(","):
        print(row(model, a), flush=True)


if __name__ == "__main__":
    main()
