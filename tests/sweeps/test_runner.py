"""A sweep runs what is missing, whatever happens to its variants, and its table tells what is there."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from mlip_jax import defaults, sweep_runner
from mlip_jax.config import ConfigError
from mlip_jax.sweep import Variant, parse
from mlip_jax.sweep_runner import Sweep, run
from mlip_jax.workdir import WorkdirError

REPOSITORY = Path(__file__).parents[1]
CONFIG = """
from mlip_jax.defaults import {defaults}_defaults

def get_config():
    config = {defaults}_defaults()
    config.task = "{task}"
    return config

def sweep():
    return {variants}
"""
# Stands for a variant. It counts its starts, and does what the file "do" of its workdir or of the one above says.
PROGRAM = """
import pathlib, sys, time
workdir = pathlib.Path(sys.argv[1])
with open(workdir / "starts", "a") as file:
    print("start", file=file)
do = next((f.read_text() for f in (workdir / "do", workdir.parent / "do") if f.exists()), "end 0")
print("this is", workdir.name, flush=True)
what, number = do.split()
if what == "wait":
    time.sleep(float(number))
sys.exit(int(number) if what == "end" else 0)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that runs a sweep of three seeds whose variants are the program above; returns the exit code."""
    monkeypatch.setattr(Sweep, "_command", lambda self, variant: [
        sys.executable, "-c", PROGRAM, str(self._folder / variant.name)])
    monkeypatch.setattr(sweep_runner.distributed, "from_environment", lambda: None)
    config_file = tmp_path / "config.py"
    variants = '[{"name": n, "data.max_atoms": i} for i, n in enumerate("abc", 1)]'
    config_file.write_text(CONFIG.format(defaults="convert", task="convert", variants=variants))

    def sweep(change=(), **options):
        config = defaults.convert_defaults()
        config.update(dict(change))
        return run(str(config_file), config, tmp_path / "run", [], **options)

    return sweep


def do(folder, what):
    """What the variant of a folder does, or all variants."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "do").write_text(what)


def starts(folder):
    """How often each variant was started."""
    return "".join(str(len(f.read_text().split()) if (f := folder / n / "starts").exists() else 0) for n in "abc")


def states(folder):
    with open(folder / "sweep.csv", newline="") as file:
        return [row["state"] for row in csv.DictReader(file)]


def test_variants_run_once(sweep, tmp_path, capsys):
    assert sweep() == 0
    assert starts(tmp_path / "run") == "111" and states(tmp_path / "run") == ["done"] * 3
    assert "this is b" in capsys.readouterr().out and "this is b" in (tmp_path / "run/b/log.txt").read_text()
    assert sweep() == 0
    assert starts(tmp_path / "run") == "111"


def test_a_failure_does_not_stop_the_others(sweep, tmp_path, capsys):
    do(tmp_path / "run/b", "end 3")
    assert sweep() == 1
    assert starts(tmp_path / "run") == "111" and states(tmp_path / "run") == ["done", "failed", "done"]
    shown = capsys.readouterr().out
    assert "b failed; the last lines of" in shown and shown.rindex("this is b") > shown.rindex("this is c")
    (tmp_path / "run/b/do").unlink()
    assert sweep() == 0
    assert starts(tmp_path / "run") == "121" and states(tmp_path / "run") == ["done"] * 3


def test_a_variant_that_wants_to_be_started_again_stops_the_sweep(sweep, tmp_path):
    do(tmp_path / "run/b", "end 75")
    assert sweep() == 75
    assert starts(tmp_path / "run") == "110" and states(tmp_path / "run") == ["done", "stopped", "waiting"]
    (tmp_path / "run/b/do").unlink()
    assert sweep() == 0
    assert starts(tmp_path / "run") == "121"


def test_a_signal_stops_the_sweep(sweep, tmp_path):
    do(tmp_path / "run/b", "wait 60")

    def send():
        while not (tmp_path / "run/b/starts").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    assert sweep() == 75
    thread.join()
    assert starts(tmp_path / "run") == "110" and states(tmp_path / "run") == ["done", "stopped", "waiting"]


def test_one_variant_by_its_number(sweep, tmp_path, monkeypatch):
    assert sweep(index="2") == 0
    assert starts(tmp_path / "run") == "001" and states(tmp_path / "run") == ["waiting", "waiting", "done"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert sweep(index="slurm") == 0
    assert starts(tmp_path / "run") == "011"
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID, which is not set"):
        sweep(index="slurm")


@pytest.mark.parametrize("index", ["3", "-1", "a", "1.0", ""])
def test_number_that_does_not_exist(sweep, index):
    with pytest.raises(ConfigError, match="variants 0 to 2; received the number"):
        sweep(index=index)


def test_list_runs_nothing(sweep, tmp_path, capsys):
    assert sweep(list_only=True) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["0", "a"], ["1", "b"], ["2", "c"]]
    assert parse(lines[1][2]) == {"data.max_atoms": 2} and not (tmp_path / "run").exists()


def test_collect_makes_the_table_alone(sweep, tmp_path):
    assert sweep(index="0") == 0
    (tmp_path / "run/sweep.csv").unlink()
    assert sweep(collect_only=True) == 0
    assert states(tmp_path / "run") == ["done", "waiting", "waiting"] and starts(tmp_path / "run") == "100"


def test_what_was_done_with_another_config_is_not_done(sweep, tmp_path):
    assert sweep() == 0
    assert sweep(change={"data": {"min_atoms": 2}}, collect_only=True) == 0
    assert states(tmp_path / "run") == ["waiting"] * 3
    assert sweep(change={"data": {"charge": float("nan")}}) == 0
    assert sweep(change={"data": {"charge": float("nan")}}) == 0  # nan is the same as nan
    assert starts(tmp_path / "run") == "222"


def test_a_variant_that_came_to_nothing_leaves_its_folder_to_the_corrected_one(sweep, tmp_path, monkeypatch):
    (tmp_path / "run/a").mkdir(parents=True)
    (tmp_path / "run/b").mkdir()
    (tmp_path / "run/a/config.json").write_text("{}")
    (tmp_path / "run/b/config.json").write_text("{}")
    (tmp_path / "run/b/metrics.csv").write_text("step\n")
    monkeypatch.setattr(Sweep, "_command", lambda self, variant: [sys.executable, "-c", "raise SystemExit(1)"])
    assert sweep() == 1
    assert not (tmp_path / "run/a/config.json").exists() and (tmp_path / "run/b/config.json").exists()


def test_several_sweeps_share_the_work(sweep, tmp_path):
    """Two at once: none runs what the other does, and the table has all."""
    do(tmp_path / "run", "wait 0.5")
    script = (f"import sys\nfrom mlip_jax import defaults, sweep_runner\n"
              f"sweep_runner.Sweep._command = lambda self, v: [sys.executable, '-c', {PROGRAM!r}, "
              f"str(self._folder / v.name)]\n"
              f"sys.exit(sweep_runner.run({str(tmp_path / 'config.py')!r}, defaults.convert_defaults(), "
              f"{str(tmp_path / 'run')!r}, []))\n")
    both = [subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                             stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    assert starts(tmp_path / "run") == "111"
    assert sweep(collect_only=True) == 0 and states(tmp_path / "run") == ["done"] * 3


def test_a_variant_that_another_process_is_at(sweep, tmp_path):
    (tmp_path / "run/b").mkdir(parents=True)
    with sweep_runner._lock(tmp_path / "run/b/.sweep.lock", wait=False) as free:
        assert free
        with pytest.raises(WorkdirError, match="another process is at work"):
            sweep(index="1")
        assert sweep() == 0  # it is left to the other one
    assert starts(tmp_path / "run") == "101"


def test_a_sweep_that_was_killed_is_not_running(sweep, tmp_path):
    (tmp_path / "run/b").mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    attempt = {"state": "running", "host": sweep_runner.socket.gethostname(), "process": ended.pid, "seconds": 5.0}
    (tmp_path / "run/b/attempt.json").write_text(json.dumps(attempt))
    assert sweep(collect_only=True) == 0 and states(tmp_path / "run")[1] == "stopped"
    (tmp_path / "run/b/attempt.json").write_text(json.dumps(attempt | {"process": os.getpid()}))
    assert sweep(collect_only=True) == 0 and states(tmp_path / "run")[1] == "running"


def test_the_folder_of_a_run_is_refused(sweep, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(WorkdirError, match="is the folder of a run"):
        sweep()


def test_several_processes_of_a_run_do_one_variant_together(sweep, tmp_path, monkeypatch):
    environment = sweep_runner.distributed.Environment("host:1234", 2, 1)
    monkeypatch.setattr(sweep_runner.distributed, "from_environment", lambda: environment)
    with pytest.raises(ConfigError, match="--sweep_index"):
        sweep()
    (tmp_path / "run/b").mkdir(parents=True)
    assert sweep(index="1") == 0
    assert starts(tmp_path / "run") == "010" and not (tmp_path / "run/sweep.csv").exists()  # the first keeps the books
    monkeypatch.setattr(sweep_runner.distributed, "from_environment", lambda: environment._replace(process_id=0))
    assert sweep(index="1") == 0
    assert starts(tmp_path / "run") == "020" and states(tmp_path / "run")[1] == "done"


def command(config, workdir, *flags):
    cache = Path(tempfile.gettempdir()) / f"mlip_jax_tests_{os.getuid()}"
    return subprocess.run(
        [sys.executable, "-m", "mlip_jax.main", f"--config={config}", f"--workdir={workdir}", "--sweep", *flags],
        capture_output=True, text=True, timeout=300, cwd=workdir.parent, env=os.environ | {
            "GLIBC_TUNABLES": "", "PYTHONPATH": str(REPOSITORY), "JAX_COMPILATION_CACHE_DIR": str(cache)})


DEPENDENT = [{"name": "b", "data.path": "{sweep}/a"}, {"name": "a"}, {"name": "c", "data.path": "{sweep}/b,{sweep}/a"}]


@pytest.fixture
def dependent(tmp_path, monkeypatch):
    """As `sweep`, of variants that need each other's folders, with a report."""
    monkeypatch.setattr(Sweep, "_command", lambda self, variant: [
        sys.executable, "-c", PROGRAM, str(self._folder / variant.name)])
    monkeypatch.setattr(sweep_runner.distributed, "from_environment", lambda: None)
    monkeypatch.setattr(sweep_runner, "_POLL", 0.05)
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(defaults="convert", task="convert", variants=DEPENDENT)
                    + "\ndef report(folder):\n    (folder / 'made').write_text('x')\n    return folder / 'made'\n")
    return lambda **options: run(str(path), defaults.convert_defaults(), tmp_path / "run", [], **options)


def test_what_a_variant_needs_comes_first(dependent, tmp_path, capsys):
    assert dependent() == 0
    begun = [json.loads((tmp_path / "run" / n / "done.json").read_text())["seconds"] for n in "abc"]
    assert len(begun) == 3 and starts(tmp_path / "run") == "111"
    order = sorted("abc", key=lambda n: (tmp_path / "run" / n / "done.json").stat().st_mtime_ns)
    assert order == ["a", "b", "c"]
    assert (tmp_path / "run/made").exists() and "report: " in capsys.readouterr().out


def test_what_needs_a_failed_variant_fails(dependent, tmp_path, caplog):
    do(tmp_path / "run/a", "end 3")
    assert dependent() == 1
    assert starts(tmp_path / "run") == "100" and "b: needs a first" in caplog.text
    do(tmp_path / "run/a", "end 0")
    assert dependent() == 0 and starts(tmp_path / "run") == "211"


def test_one_variant_alone_does_not_wait_for_what_it_needs(dependent, tmp_path, caplog):
    assert dependent(index="0") == 1 and "b: needs a first" in caplog.text
    assert dependent(index="1") == 0 and dependent(index="0") == 0


def test_folders_and_other_config_files_in_the_command(tmp_path):
    variant = Variant("b", {"init.workdir": "{sweep}/a"}, defaults.property_defaults(), "configs/force2prop.py:all")
    made = Sweep(tmp_path / "run", [variant], [{}], ["--config=x.py", "--config.seed=3", "--debug", "--config", "y.py"],
                 "title")._command(variant)
    assert made[3:6] == ["--debug", "--config=configs/force2prop.py:all", "--nosweep"]
    assert made[-1] == f"--overrides={{'init.workdir': '{tmp_path / 'run'}/a'}}"


def test_from_the_command_line(tmp_path):
    """Overrides come to the config of a variant as they are, after those of the command line."""
    overrides = {"data.elements": ("H", "C", "O"), "data.max_atoms": None, "data.charge": 0.0}
    (tmp_path / "config.py").write_text(CONFIG.format(defaults="inspect", task="inspect_data", variants=[
        {"name": "good", **overrides}, {"name": "bad", "data.path": "nowhere.hdf5"}]))
    process = command(tmp_path / "config.py", tmp_path / "run", "--config.data.max_atoms=9", "--config.data.charge=1",
                      "--overrides={'data.min_atoms': 2, 'data.charge': 2.0}",
                      f"--config.data.path={REPOSITORY}/tests/data/gfn2_small.hdf5")
    assert process.returncode == 1, process.stderr + process.stdout
    assert "bad failed" in process.stdout and "nowhere.hdf5: no such file" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr
    data = json.loads((tmp_path / "run/good/config.json").read_text())["data"]
    assert data["elements"] == ["H", "C", "O"] and data["max_atoms"] is None and data["charge"] == 0.0
    assert data["min_atoms"] == 2
    assert states(tmp_path / "run") == ["done", "failed"] and (tmp_path / "run/good/dataset.md").exists()
    assert not (tmp_path / "run/bad/config.json").exists()


@pytest.mark.slow
def test_scores_of_a_training_run_are_in_the_table(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(defaults="train", task="train", variants=[
        {"seed": 1, "model.options": {"num_features": 12, "num_layers": 1, "num_heads": 2, "degrees": (1, 2)}}]))
    flags = {"data.path": REPOSITORY / "tests/data/gfn2_small.hdf5", "train.num_steps": 8, "train.batch_size": 4,
             "train.valid_every": 4, "optimizer.warmup_steps": 2, "data.charge": 0.0}
    process = command(tmp_path / "config.py", tmp_path / "run", *(f"--config.{k}={v}" for k, v in flags.items()))
    assert process.returncode == 0, process.stderr + process.stdout
    workdir = next((tmp_path / "run").glob("seed=1*"))
    with open(tmp_path / "run/sweep.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert float(row["test_energy_mae_mev_per_atom"]) == metrics["test"]["energy_mae_mev_per_atom"]
    assert float(row["training_seconds"]) == metrics["seconds"] and row["best_step"] in ("4", "8")
    assert (tmp_path / "run/sweep.png").exists()
