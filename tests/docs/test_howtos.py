"""Tests that the files and commands of the how-to pages work, in a copy of the package."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_spec = importlib.util.spec_from_file_location(
    "docs_markdown", Path(__file__).with_name("markdown.py")
)
markdown = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(markdown)
PARTS = ("mlip_jax", "configs", "tests", "pyproject.toml")


def follow(page: str, folder: Path) -> dict[str, str]:
    """Write the files of a page and run its commands in order; return their outputs by title."""
    for part in PARTS:
        source = markdown.ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(folder),
        "JAX_PLATFORMS": "cpu",
    }
    printed = {}
    for block in markdown.blocks((markdown.DOCS / "howto" / page).read_text()):
        if block.language == "python" and block.title:
            path = folder / block.title
            assert not path.exists(), f"{block.title}: exists already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "sh":
            done = subprocess.run(
                ["bash", "-e", "-c", block.text],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, (
                f"{page}: {block.text}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
            printed[block.title] = done.stdout + done.stderr
    style = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "mlip_jax", "configs"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert style.returncode == 0 or "No module named" in style.stderr, style.stdout
    return printed


@pytest.mark.slow
def test_add_a_model(tmp_path):
    printed = follow("model.md", tmp_path)
    assert "passed" in printed["contract"] and "skipped" not in printed["contract"]
    metrics = json.loads((tmp_path / "runs/my_model/metrics.json").read_text())
    assert metrics and (tmp_path / "runs/my_model/report.html").is_file()
    assert "eV/Å" in printed["use"] and "nan" not in printed["use"]


@pytest.mark.slow
def test_add_a_data_set(tmp_path):
    printed = follow("dataset.md", tmp_path)
    assert "passed" in printed["contract"] and "skipped" not in printed["contract"]
    manifest = json.loads((tmp_path / "stores/mine/manifest.json").read_text())
    assert "EMT" in json.dumps(manifest) and (tmp_path / "runs/look/dataset.md").is_file()
    dataset = json.loads((tmp_path / "runs/look/dataset.json").read_text())
    assert "640" in json.dumps(dataset)  # 16 molecules of 40 conformations


@pytest.mark.slow
def test_add_an_experiment(tmp_path):
    follow("experiment.md", tmp_path)
    metrics = json.loads((tmp_path / "runs/my_experiment/metrics.json").read_text())
    assert metrics and np.isfinite(_numbers(metrics)).any()
    assert (tmp_path / "runs/my_experiment/report.html").is_file()
    assert sorted(p.parent.name for p in (tmp_path / "runs/my_sweep").glob("*/metrics.json")) == [
        "cutoff_4.0",
        "cutoff_5.0",
    ]
    assert (tmp_path / "runs/my_sweep/sweep.md").is_file()


def _numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in _numbers(v)]
    return [float(value)] if isinstance(value, int | float) else []
