"""Tests for the runner: a sweep runs its incomplete variants and writes their table."""

import contextlib
import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.distributed import Environment
from mlip_jax.sweeps import runner
from mlip_jax.sweeps.attempts import lock_folder
from mlip_jax.sweeps.overrides import parse
from mlip_jax.sweeps.runner import run
from mlip_jax.workdir import WorkdirError
from tests.compilation import cache_directory

REPOSITORY = Path(__file__).parents[2]
INTERPRETER = sys.executable  # which the sweeps of these tests replace
CONFIG = """
from mlip_jax.defaults import {defaults}_defaults

def get_config():
    config = {defaults}_defaults()
    config.task = "{task}"
    return config

def sweep():
    return {variants}
"""
SEEDS = [{"name": name, "data.max_atoms": i} for i, name in enumerate("abc", 1)]
DEPENDENT = [
    {"name": "b", "data.path": "{sweep}/a"},
    {"name": "a"},
    {"name": "c", "data.path": "{sweep}/b,{sweep}/a"},
]
REPORT = """
def report(folder):
    (folder / "report.txt").write_text("x")
    return folder / "report.txt"
"""
# Fake of Python in the command of a variant: appends the command to the file "starts" of its
# workdir, and runs the file "do" of that folder or of its parent.
PYTHON = """#!/bin/sh
for argument; do
    case $argument in --workdir=*) workdir=${argument#--workdir=};; esac
done
echo "$@" >> "$workdir/starts"
echo "this is ${workdir##*/}"
for file in "$workdir/do" "$workdir/../do"; do
    if [ -f "$file" ]; then . "$file"; fi
done
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Function that runs a sweep with the shell script above as Python."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(runner.distributed, "from_environment", lambda: None)
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.05)

    def start(variants=SEEDS, change=(), more="", arguments=(), **options):
        path = tmp_path / "config.py"
        path.write_text(CONFIG.format(defaults="convert", task="convert", variants=variants) + more)
        config = defaults.convert_defaults()
        config.update(dict(change))
        return run(str(path), config, tmp_path / "run", arguments, **options)

    return start


def do(folder, command):
    """Set the shell command that the variant of a folder, or all variants, run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "do").write_text(command)


def starts(folder):
    """Return the number of starts per variant."""
    return "".join(
        str(len(f.read_text().splitlines()) if (f := folder / n / "starts").exists() else 0)
        for n in "abc"
    )


def states(folder):
    with open(folder / "sweep.csv", newline="") as file:
        return [row["state"] for row in csv.DictReader(file)]


def test_variants_run_once(start, tmp_path, capsys):
    assert start() == 0
    assert starts(tmp_path / "run") == "111" and states(tmp_path / "run") == ["done"] * 3
    assert (
        "this is b" in capsys.readouterr().out
        and "this is b" in (tmp_path / "run/b/log.txt").read_text()
    )
    assert start() == 0
    assert starts(tmp_path / "run") == "111"


def test_a_failure_does_not_stop_the_others(start, tmp_path, capsys):
    do(tmp_path / "run/b", "exit 3")
    assert start() == 1
    assert starts(tmp_path / "run") == "111" and states(tmp_path / "run") == [
        "done",
        "failed",
        "done",
    ]
    shown = capsys.readouterr().out
    assert "b failed; last lines of" in shown and shown.rindex("this is b") > shown.rindex(
        "this is c"
    )
    (tmp_path / "run/b/do").unlink()
    assert start() == 0
    assert starts(tmp_path / "run") == "121" and states(tmp_path / "run") == ["done"] * 3


def test_a_variant_that_requests_a_restart_stops_the_sweep(start, tmp_path):
    do(tmp_path / "run/b", "exit 75")
    assert start() == 75
    assert starts(tmp_path / "run") == "110" and states(tmp_path / "run") == [
        "done",
        "stopped",
        "waiting",
    ]
    (tmp_path / "run/b/do").unlink()
    assert start() == 0
    assert starts(tmp_path / "run") == "121"


def test_a_signal_stops_the_sweep(start, tmp_path):
    do(tmp_path / "run/b", "kill -TERM $PPID; exec sleep 60")
    assert start() == 75
    assert starts(tmp_path / "run") == "110" and states(tmp_path / "run") == [
        "done",
        "stopped",
        "waiting",
    ]


def test_one_variant_by_its_number(start, tmp_path, monkeypatch):
    assert start(index="2") == 0
    assert starts(tmp_path / "run") == "001" and states(tmp_path / "run") == [
        "waiting",
        "waiting",
        "done",
    ]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert start(index="slurm") == 0
    assert starts(tmp_path / "run") == "011"
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID, which is not set"):
        start(index="slurm")


@pytest.mark.parametrize("index", ["3", "-1", "a", "1.0", ""])
def test_an_unknown_number_is_an_error(start, index):
    with pytest.raises(ConfigError, match="numbered from 0 to 2, received"):
        start(index=index)


def test_list_runs_nothing(start, tmp_path, capsys):
    assert start(list_only=True) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["0", "a"], ["1", "b"], ["2", "c"]]
    assert parse(lines[1][2]) == {"data.max_atoms": 2} and not (tmp_path / "run").exists()


def test_collect_writes_only_the_table(start, tmp_path):
    assert start(index="0") == 0
    (tmp_path / "run/sweep.csv").unlink()
    assert start(collect_only=True) == 0
    assert (
        states(tmp_path / "run") == ["done", "waiting", "waiting"]
        and starts(tmp_path / "run") == "100"
    )


def test_a_variant_done_with_another_config_is_not_done(start, tmp_path):
    assert start() == 0
    assert start(change={"data": {"min_atoms": 2}}, collect_only=True) == 0
    assert states(tmp_path / "run") == ["waiting"] * 3
    assert start(change={"data": {"charge": float("nan")}}) == 0
    assert start(change={"data": {"charge": float("nan")}}) == 0  # nan is the same as nan
    assert starts(tmp_path / "run") == "222"


def test_a_variant_without_results_releases_its_folder(start, tmp_path):
    do(tmp_path / "run/a", "rm $workdir/starts $workdir/do; exit 1")
    do(tmp_path / "run/b", "exit 1")
    for name in "ab":
        (tmp_path / "run" / name / "config.json").write_text("{}")
    (tmp_path / "run/b/metrics.csv").write_text("step\n")
    assert start() == 1
    assert (
        not (tmp_path / "run/a/config.json").exists() and (tmp_path / "run/b/config.json").exists()
    )


def test_several_sweeps_share_the_work(start, tmp_path):
    """A second process that starts while the first one runs a variant does not repeat its work."""
    do(tmp_path / "run/a", "read go < $workdir/gate")
    os.mkfifo(tmp_path / "run/a/gate")
    assert start(list_only=True) == 0  # writes the config file
    script = (
        "import sys\nfrom mlip_jax import defaults\nfrom mlip_jax.sweeps.runner import run\n"
        "python, file, folder = sys.argv[1:]\nsys.executable = python\n"
        "sys.exit(run(file, defaults.convert_defaults(), folder, []))\n"
    )
    command = [
        INTERPRETER,
        "-c",
        script,
        sys.executable,
        str(tmp_path / "config.py"),
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "this is a\n"
        assert start() == 0
        assert starts(tmp_path / "run") == "111" and states(tmp_path / "run") == [
            "running",
            "done",
            "done",
        ]
        (tmp_path / "run/a/gate").write_text("go\n")
        assert "table: " in first.stdout.read()
    assert first.returncode == 0
    assert starts(tmp_path / "run") == "111" and states(tmp_path / "run") == ["done"] * 3


def test_a_variant_that_another_process_runs(start, tmp_path):
    (tmp_path / "run/b").mkdir(parents=True)
    with lock_folder(tmp_path / "run/b", wait=False) as free:
        assert free
        with pytest.raises(WorkdirError, match="another process is running"):
            start(index="1")
        assert start() == 0  # it is left to the other one
    assert starts(tmp_path / "run") == "101"


def test_a_sweep_that_was_killed_is_not_running(start, tmp_path):
    (tmp_path / "run/b").mkdir(parents=True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    attempt = {
        "state": "running",
        "host": socket.gethostname(),
        "process": ended.pid,
        "seconds": 5.0,
    }
    (tmp_path / "run/b/attempt.json").write_text(json.dumps(attempt))
    assert start(collect_only=True) == 0 and states(tmp_path / "run")[1] == "stopped"
    (tmp_path / "run/b/attempt.json").write_text(json.dumps(attempt | {"process": os.getpid()}))
    assert start(collect_only=True) == 0 and states(tmp_path / "run")[1] == "running"
    # of another machine only the lock is known; without it, sweeps waited forever
    (tmp_path / "run/b/attempt.json").write_text(json.dumps(attempt | {"host": "switched-off"}))
    assert start(collect_only=True) == 0 and states(tmp_path / "run")[1] == "stopped"
    with lock_folder(tmp_path / "run/b", wait=False):
        assert start(collect_only=True) == 0 and states(tmp_path / "run")[1] == "running"


@pytest.mark.parametrize("name", ["attempt.json", "done.json"])
@pytest.mark.parametrize("text", ["[]", "7", '"x"', '{"state": 1}'])
def test_another_kind_of_json_in_the_folder_of_a_variant(start, tmp_path, name, text):
    """Files of other people, whose KeyErrors had no remedy."""
    (tmp_path / "run/a").mkdir(parents=True)
    (tmp_path / f"run/a/{name}").write_text(text)
    with contextlib.suppress(WorkdirError):
        assert start(collect_only=True) == 0


def test_pipes_in_the_folder_of_a_variant_are_not_opened(start, tmp_path):
    """Their opening would never end."""
    (tmp_path / "run/a").mkdir(parents=True)
    attempt = {"state": "running", "host": "switched-off", "process": 1, "seconds": 5.0}
    (tmp_path / "run/a/attempt.json").write_text(json.dumps(attempt))
    os.mkfifo(tmp_path / "run/a/.sweep.lock")
    with pytest.raises(WorkdirError, match="a pipe"):
        start(collect_only=True)


def test_the_workdir_of_a_run_is_an_error(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(WorkdirError, match="the workdir of a single run"):
        start()


def test_several_processes_of_a_run_share_one_variant(start, tmp_path, monkeypatch):
    environment = Environment("host:1234", 2, 1)
    monkeypatch.setattr(runner.distributed, "from_environment", lambda: environment)
    with pytest.raises(ConfigError, match="--sweep_index"):
        start()
    (tmp_path / "run/b").mkdir(parents=True)
    assert start(index="1") == 0
    # process 0 writes the table
    assert starts(tmp_path / "run") == "010" and not (tmp_path / "run/sweep.csv").exists()
    monkeypatch.setattr(
        runner.distributed, "from_environment", lambda: environment._replace(process_id=0)
    )
    assert start(index="1") == 0
    assert starts(tmp_path / "run") == "020" and states(tmp_path / "run")[1] == "done"


def test_needed_variants_come_first(start, tmp_path, capsys):
    assert start(DEPENDENT, more=REPORT) == 0
    assert starts(tmp_path / "run") == "111"
    order = sorted("abc", key=lambda n: (tmp_path / "run" / n / "done.json").stat().st_mtime_ns)
    assert order == ["a", "b", "c"]
    assert (tmp_path / "run/report.txt").exists() and "report: " in capsys.readouterr().out
    assert (
        f"'data.path': '{tmp_path}/run/b,{tmp_path}/run/a'"
        in (tmp_path / "run/c/starts").read_text()
    )


def test_a_variant_that_needs_a_failed_one_fails(start, tmp_path, caplog):
    do(tmp_path / "run/a", "exit 3")
    assert start(DEPENDENT) == 1
    assert starts(tmp_path / "run") == "100" and "b: requires a first" in caplog.text
    do(tmp_path / "run/a", "exit 0")
    assert start(DEPENDENT) == 0 and starts(tmp_path / "run") == "211"


def test_a_single_variant_does_not_wait_for_required_variants(start, tmp_path, caplog):
    assert start(DEPENDENT, index="0") == 1 and "b: requires a first" in caplog.text
    assert start(DEPENDENT, index="1") == 0 and start(DEPENDENT, index="0") == 0


def test_another_config_file_in_the_command(start, tmp_path):
    variants = [
        {"name": "a"},
        {"name": "b", "config": "configs/convert.py", "data.path": "{sweep}/a"},
    ]
    with pytest.raises(ConfigError, match="--config.seed=3: not supported"):
        start(variants, arguments=["--config=x.py", "--config.seed=3"])
    assert start(variants, arguments=["--config=x.py", "--debug", "--config", "y.py"]) == 0
    assert (tmp_path / "run/b/starts").read_text() == (
        f"-m mlip_jax.main --debug --config=configs/convert.py --nosweep --workdir={tmp_path}/run/b "
        f"--overrides={{'data.path': '{tmp_path}/run/a'}}\n"
    )


def test_variants_import_nothing_from_the_current_folder(start, tmp_path, monkeypatch):
    """With `python -m`, a file numpy.py there would run in place of NumPy."""
    monkeypatch.chdir(tmp_path)
    assert start() == 0
    assert (tmp_path / "run/a/starts").read_text().startswith("-P -m mlip_jax.main ")


def command(config, workdir, *flags):
    cache = cache_directory()
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mlip_jax.main",
            f"--config={config}",
            f"--workdir={workdir}",
            "--sweep",
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=workdir.parent,
        env=os.environ
        | {
            "GLIBC_TUNABLES": "",
            "PYTHONPATH": str(REPOSITORY),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        },
    )


# A task of this test, which needs no JAX.
TASK = """
from mlip_jax import config as configs
from mlip_jax.workdir import claimed

def run(config, workdir):
    with claimed(workdir, configs.identity(config)) as folder:
        if config.data.path == "nowhere":
            raise RuntimeError("nowhere: no such file")
        (folder / "result").touch()
"""


def test_from_the_command_line(tmp_path):
    """Overrides of a variant replace flags, and the error of a variant is shown at the end."""
    (tmp_path / "stub.py").write_text(TASK)
    overrides = {"data.elements": ("H", "C", "O"), "data.max_atoms": None, "data.charge": 0.0}
    (tmp_path / "config.py").write_text(
        f"from mlip_jax import tasks\ntasks.__path__.append({str(tmp_path)!r})\n"
        + CONFIG.format(
            defaults="inspect",
            task="stub",
            variants=[{"name": "good", **overrides}, {"name": "bad", "data.path": "nowhere"}],
        )
    )
    process = command(
        tmp_path / "config.py",
        tmp_path / "run",
        "--config.data.max_atoms=9",
        "--config.data.charge=1",
        "--overrides={'data.min_atoms': 2, 'data.charge': 2.0}",
        "--config.data.path=somewhere",
    )
    assert process.returncode == 1, process.stderr + process.stdout
    assert "bad failed" in process.stdout and "error: nowhere: no such file" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr
    data = json.loads((tmp_path / "run/good/config.json").read_text())["data"]
    assert (
        data["elements"] == ["H", "C", "O"] and data["max_atoms"] is None and data["charge"] == 0.0
    )
    assert data["min_atoms"] == 2 and data["path"] == "somewhere"
    assert (
        states(tmp_path / "run") == ["done", "failed"] and (tmp_path / "run/good/result").exists()
    )
    assert not (tmp_path / "run/bad/config.json").exists()


@pytest.mark.slow
def test_scores_of_a_training_run_are_in_the_table(tmp_path):
    (tmp_path / "config.py").write_text(
        CONFIG.format(
            defaults="train",
            task="train",
            variants=[
                {
                    "seed": 1,
                    "model.options": {
                        "num_features": 12,
                        "num_layers": 1,
                        "num_heads": 2,
                        "degrees": (1, 2),
                    },
                }
            ],
        )
    )
    flags = {
        "data.path": REPOSITORY / "tests/data/gfn2_small.hdf5",
        "train.num_steps": 8,
        "train.batch_size": 4,
        "train.valid_every": 4,
        "optimizer.warmup_steps": 2,
        "data.charge": 0.0,
    }
    process = command(
        tmp_path / "config.py", tmp_path / "run", *(f"--config.{k}={v}" for k, v in flags.items())
    )
    assert process.returncode == 0, process.stderr + process.stdout
    workdir = next((tmp_path / "run").glob("seed=1*"))
    with open(tmp_path / "run/sweep.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert float(row["test_energy_mae_mev_per_atom"]) == metrics["test"]["energy_mae_mev_per_atom"]
    assert float(row["training_seconds"]) == metrics["seconds"] and row["best_step"] in ("4", "8")
    assert (tmp_path / "run/sweep.png").exists()
