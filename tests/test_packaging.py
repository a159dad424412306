"""Tests for the wheel: its files, and that it runs outside of the repository."""

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


BUILD = """
import os, shutil
from setuptools import build_meta
build_meta.build_wheel("../direct")
archive = build_meta.build_sdist("..")
os.chdir("..")
shutil.unpack_archive(archive)
os.chdir(archive.removesuffix(".tar.gz"))
build_meta.build_wheel("../archived")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Build a wheel in direct/, and one from the source archive in archived/, without network.

    The wheels are built in a copy, because setuptools writes folders next to the sources.
    """
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < SETUPTOOLS:
        pytest.skip(f"needs setuptools {SETUPTOOLS} or newer: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("mlip_jax", "configs"):
        shutil.copytree(
            REPOSITORY / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "copy")
    python(BUILD, folder / "copy")
    return folder


def python(code, cwd, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("way", ["direct", "archived"])
def test_the_wheel_contains_one_package_with_all_files_and_configs(folder, way):
    """Detects a second top-level folder, which could shadow or overwrite other packages."""
    with zipfile.ZipFile(next((folder / way).glob("*.whl"))) as file:
        names = file.namelist()
        about = next(name for name in names if name.endswith("METADATA")).partition("/")[0]
        assert {name.partition("/")[0] for name in names} == {"mlip_jax", about}
        for source in (REPOSITORY / "configs").glob("*.py"):
            assert file.read(f"mlip_jax/configs/{source.name}") == source.read_bytes()
        # including the templates of the reports, which are not modules
        sources = {
            str(path.relative_to(REPOSITORY))
            for path in (REPOSITORY / "mlip_jax").rglob("*")
            if path.is_file() and path.parent.name not in ("__pycache__", "configs")
        }
        assert "mlip_jax/reports/templates/page.html" in sources
        assert {n for n in names if not n.startswith(("mlip_jax/configs/", about))} == sources
        assert (
            "mlip-jax = mlip_jax.main:command"
            in file.read(f"{about}/entry_points.txt").decode().splitlines()
        )
        assert file.read(f"{about}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_wheel_runs_outside_of_the_repository(folder, tmp_path):
    """The user's config imports a shipped one, which imports another."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    zipfile.ZipFile(next((folder / "direct").glob("*.whl"))).extractall(installed)
    work.mkdir()
    (work / "mine.py").write_text(
        '"""Mine."""\nfrom mlip_jax.configs import spice_small\n\n\n'
        "def get_config():\n    return spice_small.get_config()\n"
    )
    code = "import mlip_jax; from mlip_jax.main import command; print(mlip_jax.__file__); command()"
    output = python(
        code, work, "--config=mine.py", "--help", PYTHONPATH=str(installed), GLIBC_TUNABLES=""
    )
    assert (
        output.startswith(f"{installed}/mlip_jax/__init__.py\nMine.")
        and "train.num_steps = " in output
    )
