"""The wheel: what it installs, and that it runs away from the repository."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SETUPTOOLS = 77  # as pyproject.toml requires


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built without network in a copy, since setuptools leaves folders beside the sources."""
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < SETUPTOOLS:
        pytest.skip(f"needs setuptools {SETUPTOOLS} or newer: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("mlip_jax", "configs"):
        shutil.copytree(REPOSITORY / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "copy")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_one_package_with_all_configs(wheel):
    """A second folder at the top would shadow or overwrite other packages: `configs` is a common name."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        about = next(name for name in names if name.endswith("METADATA")).partition("/")[0]
        assert {name.partition("/")[0] for name in names} == {"mlip_jax", about}
        for source in (REPOSITORY / "configs").glob("*.py"):
            assert file.read(f"mlip_jax/configs/{source.name}") == source.read_bytes()
        assert "mlip-jax = mlip_jax.main:command" in file.read(f"{about}/entry_points.txt").decode().splitlines()
        assert file.read(f"{about}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_wheel_runs_away_from_the_repository(wheel, tmp_path):
    """A config of the user that builds on a shipped one, which itself builds on another."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(installed)
    work.mkdir()
    (work / "mine.py").write_text("'''Mine.'''\nfrom mlip_jax.configs import spice_small\n\n\n"
                                  "def get_config():\n    return spice_small.get_config()\n")
    run = "import mlip_jax; from mlip_jax.main import command; print(mlip_jax.__file__); command()"
    done = subprocess.run([sys.executable, "-c", run, "--config=mine.py", "--help"], cwd=work, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(installed), "GLIBC_TUNABLES": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{installed}/mlip_jax/__init__.py\nMine.") and "train.num_steps = " in done.stdout
