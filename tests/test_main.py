"""Tests for the command: early signals, search for configs, and invalid flags."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
from absl import app

from mlip_jax import config, distributed, main
from mlip_jax.cli import flags, process
from mlip_jax.config import ConfigError
from mlip_jax.sweeps.variants import call_config_file, load

REPOSITORY = Path(__file__).parents[1]


MODULE = ("-m", "mlip_jax.main")
SCRIPT = (
    "-c",
    "from mlip_jax.main import command; command()",
)  # as in the installed command mlip-jax


def start(*arguments, program=MODULE):
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"GLIBC_TUNABLES": ""},
    )


def catches(process, number):
    """Return whether a process has a handler for a signal."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number, program", [(signal.SIGTERM, MODULE), (signal.SIGUSR1, SCRIPT)])
def test_a_signal_during_the_start_requests_a_restart(tmp_path, number, program):
    started = start("--config=configs/spice.py", f"--workdir={tmp_path / 'run'}", program=program)
    deadline = time.monotonic() + 60
    while not catches(started, number):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    # the import of JAX, which takes seconds, has not begun
    assert "jaxlib" not in Path(f"/proc/{started.pid}/maps").read_text()
    started.send_signal(number)
    output, _ = started.communicate(timeout=600)
    assert started.returncode == distributed.EXIT_REQUEUE == process.EXIT_REQUEUE and not output
    assert not (tmp_path / "run").exists()


def test_profile_of_other_tasks_is_an_error(tmp_path):
    old = ("--config.data.refuse=False", "--config.data.path=x")  # with a former name
    started = start("--config=inspect_data", f"--workdir={tmp_path / 'run'}", "--profile=3", *old)
    output, _ = started.communicate(timeout=600)
    assert started.returncode == 1 and "Traceback" not in output
    assert "--profile requires the task 'train', received 'inspect_data'" in output
    assert output.count("config field data.refuse is deprecated: use data.reject_invalid") == 1


def test_the_allocator_is_tuned_by_restarting_the_same_command(monkeypatch):
    """The command is restarted with the same options, and only if the variable is not set."""
    calls = []
    monkeypatch.setattr(process.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(
        process.os, "execv", lambda *call: calls.append((call, os.environ["GLIBC_TUNABLES"]))
    )
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "/bin/mlip-jax", "--config=spice"])
    for value in ("", "glibc.malloc.arena_max=2"):
        monkeypatch.setenv("GLIBC_TUNABLES", value)
        process.tune_allocator()
    assert not calls
    monkeypatch.delenv("GLIBC_TUNABLES")
    process.tune_allocator()
    assert calls == [
        (
            (sys.executable, [sys.executable, "-u", "/bin/mlip-jax", "--config=spice"]),
            process.ALLOCATOR,
        )
    ]


def test_shipped_configs_are_found_in_any_folder(tmp_path, monkeypatch):
    """Configs are found by path or name. A file at the given path has precedence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "md").mkdir()
    shipped = REPOSITORY / "configs"
    given = ["--workdir=runs/a", "--config=configs/spice.py:painn", "--config", "configs/md.py"]
    assert flags.with_config_path(given) == [
        "--workdir=runs/a",
        f"--config={shipped}/spice.py:painn",
        "--config",
        f"{shipped}/md.py",
    ]
    assert flags.with_config_path(["--config=spice:painn", "-config", "md"]) == [
        f"--config={shipped}/spice.py:painn",
        "-config",
        f"{shipped}/md.py",
    ]
    (tmp_path / "configs").mkdir()
    for name in ("configs/md.py", "spice.py"):
        (tmp_path / name).write_text("")
        assert config.find_file(name) == name
    assert load("spice_sweep", call_config_file("configs/spice_sweep.py", "get_config", ""))


def test_an_unknown_config_is_an_error_with_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    for given, message in (
        ("spicy", "Did you mean 'spice'.* Known: .*convert, .* stability"),
        ("configs/spicy.py:painn", "configs/spicy.py: no such config file.* Did you mean 'spice'"),
        ("spice.py", "spice.py: no such config file"),
        ("", "unknown shipped config ''"),
        ("mine", "For your own file, use --config=mine.py"),
    ):
        with pytest.raises(ConfigError, match=message):
            flags.with_config_path([f"--config={given}"])


def test_a_config_that_imports_from_configs_is_an_error_with_the_new_path(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from configs import spice\n")
    monkeypatch.setitem(sys.modules, "configs", None)  # as outside of the repository
    with pytest.raises(SystemExit, match="from mlip_jax.configs import NAME"):
        flags.parse(["mlip-jax", f"--config={tmp_path / 'mine.py'}", "--help"], "")


@pytest.mark.parametrize(
    ("command", "is_own"),
    [
        ("mine.py --seed=1", True),
        ("--config=mine.py:a --seed=1", True),
        ("--workdir=x --config mine.py", True),
        ("relax mine.py", False),
        ("--config=spice:painn", False),
        ("missing.py", False),
        ("relax", False),  # a file without suffix is no config
    ],
)
def test_only_own_configs_import_modules_of_the_current_folder(
    command, is_own, tmp_path, monkeypatch
):
    """Other people can put netCDF4.py into a folder: an optional package, which ASE would import."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "relax"):
        Path(name).write_text("")
    monkeypatch.setattr(sys, "argv", ["mlip-jax", *command.split()])
    monkeypatch.setattr(sys, "path", ["/bin"])
    monkeypatch.setattr(flags, "define", lambda args: args)
    monkeypatch.setattr(app, "run", lambda *args, **options: None)
    for _ in range(2):
        main.main()
    assert sys.path == (["/bin", str(tmp_path)] if is_own else ["/bin"])


def test_settings_of_matplotlib_in_the_current_folder_are_ignored(tmp_path, monkeypatch):
    """Such a file of other people can make each figure run LaTeX with commands of that file."""
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context({"text.usetex": True}):
        process.ignore_settings_of_matplotlib()
        assert matplotlib.rcParams["text.usetex"]
        Path("matplotlibrc").touch()
        process.ignore_settings_of_matplotlib()
        assert not matplotlib.rcParams["text.usetex"]


def test_a_file_without_suffix_is_no_config(tmp_path, monkeypatch):
    """A file "relax" in the current folder was taken for the config in place of the shipped one."""
    monkeypatch.chdir(tmp_path)
    Path("relax").write_text("")
    assert config.find_file("relax") == str(REPOSITORY / "configs/relax.py")


def test_runs_in_any_folder(tmp_path):
    """A config that imports a shipped one runs without an installed package."""
    text = "from mlip_jax.configs import md\n\ndef get_config():\n    return md.get_config()\n"
    (tmp_path / "mine.py").write_text(text)
    environment = os.environ | {"GLIBC_TUNABLES": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "mlip_jax.main", "--config=mine.py", "--workdir=runs/md"],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert (
        done.returncode == 1
        and "input is required" in done.stderr
        and "Traceback" not in done.stderr
    )
