"""Tests for tests/versions.sh, with fake interpreters that record their arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "versions.sh"
INTERPRETER = f"""#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") printf '%s\\n' "$@" >"$(dirname "$0")/../pip" ;;
  "-m pytest")
    shift 2; echo "$*"; echo "=== 3 passed, 1 skipped in 1.20s ==="; ! [ "$FAILING" ] || exit 1 ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def versions(tmp_path):
    """Return a function that runs the script with three fake interpreters on PATH."""
    for version in ("3.11", "3.12", "3.13"):
        file = tmp_path / "bin" / f"python{version}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(INTERPRETER)
        file.chmod(0o755)

    def run(*arguments, **variables):
        return subprocess.run(
            [SCRIPT, "--folder", tmp_path / "environments", *arguments],
            text=True,
            capture_output=True,
            env=os.environ | variables | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        )

    return run


def test_each_environment_has_its_versions_and_one_line(versions, tmp_path):
    done = versions("tests/models", "-x")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("3 passed, 1 skipped" in line for line in lines)
    folders = [tmp_path / "environments" / f"python{v}" for v in ("3.11", "3.12", "3.13")]
    requested = [
        next(a for a in (f / "pip").read_text().split() if a.startswith("jax==")) for f in folders
    ]
    assert requested == ["jax==0.10.0", "jax==0.11.*", "jax==0.12.*"]
    lowest, pinned, newest = ((f / "constraints.txt").read_text().splitlines() for f in folders)
    assert "numpy==2.0" in lowest and not any(line.startswith("jax==") for line in lowest + pinned)
    assert any(line.startswith("flax==") for line in pinned) and newest == []
    assert (tmp_path / "environments/python3.12.log").read_text().splitlines() == [
        "tests/models -x",
        "=== 3 passed, 1 skipped in 1.20s ===",
    ]


def test_failure_is_shown_and_an_unchanged_environment_is_reused(versions, tmp_path):
    assert versions("--python", "3.12").returncode == 0
    (tmp_path / "environments/python3.12/pip").unlink()
    done = versions("--python", "3.12", "tests/graphs", FAILING="1")
    assert done.returncode == 1 and done.stdout.startswith("tests/graphs\n")
    assert not (tmp_path / "environments/python3.12/pip").exists()


def test_an_unknown_version_is_an_error(versions):
    done = versions("--python", "3.9")
    assert done.returncode == 2 and "3.11, 3.12 or 3.13" in done.stderr and done.stdout == ""
