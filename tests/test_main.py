"""The command: signals of its first seconds, and flags that do not go with the config."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlip_jax import distributed, main
from mlip_jax.sweeps.variants import call_config_file, load

REPOSITORY = Path(__file__).parents[1]


def start(*arguments):
    return subprocess.Popen([sys.executable, "-m", "mlip_jax.main", *map(str, arguments)], cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"GLIBC_TUNABLES": ""})


def catches(process, number):
    """Whether a process has a handler of a signal."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_of_the_first_seconds_asks_to_be_started_again(tmp_path, number):
    process = start("--config=configs/spice.py", f"--workdir={tmp_path / 'run'}")
    deadline = time.monotonic() + 60
    while not catches(process, number):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    assert "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text()  # which takes seconds to import
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == distributed.EXIT_REQUEUE == main._EXIT_REQUEUE and not output
    assert not (tmp_path / "run").exists()


def test_a_profile_is_of_training(tmp_path):
    output, _ = (process := start("--config=configs/inspect_data.py", f"--workdir={tmp_path / 'run'}",
                                  "--profile=3")).communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in output
    assert "--profile is of training; the task of this config is 'inspect_data'" in output


def test_configs_come_with_the_package(tmp_path, monkeypatch):
    """In a folder without them the package's own are found; one's own file of that name goes first."""
    monkeypatch.chdir(tmp_path)
    given = ["--workdir=runs/a", "--config=configs/spice.py:painn", "--config", "configs/md.py"]
    shipped = REPOSITORY / "configs"
    assert main._with_found_config(given) == [
        "--workdir=runs/a", f"--config={shipped}/spice.py:painn", "--config", f"{shipped}/md.py"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/md.py").write_text("")
    assert main._with_found_config(given)[3] == "configs/md.py"
    assert main._with_found_config(["--config=configs/none.py"]) == ["--config=configs/none.py"]
    assert load("configs/spice_sweep.py", call_config_file("configs/spice_sweep.py", "get_config", ""))


def test_runs_in_any_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from configs import md\n\ndef get_config():\n    return md.get_config()\n")
    environment = os.environ | {"GLIBC_TUNABLES": "", "PYTHONPATH": str(REPOSITORY)}
    for config in ("configs/md.py", "mine.py"):
        done = subprocess.run([sys.executable, "-m", "mlip_jax.main", f"--config={config}", "--workdir=runs/md"],
                              cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
        assert done.returncode == 1 and "force_field" in done.stderr and "Traceback" not in done.stderr
