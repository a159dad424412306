"""Virtual environments of the peers of benchmarks/models.py, one each, since their requirements exclude each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TORCH = "2.13.0+cpu"


class Environment(NamedTuple):
    """What goes into one.

    Attributes:
      package, version: The peer. torch: Whether it needs PyTorch.
      constraints: Further pins.
      not_required: Requirements of the package that are left out, since they exclude the pinned PyTorch.
      also: Further packages, pinned.
    """

    package: str
    version: str
    torch: bool = True
    constraints: tuple[str, ...] = ()
    not_required: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


ENVIRONMENTS = {
    "spk": Environment("schnetpack", "2.1.1", constraints=("setuptools<81",), not_required=("sympy",)),
    # torch-sim relaxes with SchNetPack's PaiNN; versions after 0.3.0 ask for Python 3.12
    "ts": Environment("schnetpack", "2.1.1", constraints=("setuptools<81",), not_required=("sympy",),
                      also=("torch-sim-atomistic==0.3.0",)),
    "tmd": Environment("torchmd-net", "3.1.0"),
    "mace": Environment("mace-torch", "0.3.16"),
    "mlip": Environment("mlip", "0.2.5", torch=False),
}

_REQUIREMENTS = """
import importlib.metadata, re, sys
for line in importlib.metadata.requires(sys.argv[1]) or []:
    if "extra ==" not in line and re.match(r"[\\w.-]+", line)[0] not in sys.argv[2:]:
        print(line)
"""


def python_of(home: Path, name: str) -> Path:
    """The interpreter of an environment."""
    return home / f"v_{name}" / "bin" / "python"


def make(home: Path, name: str, torch: str = TORCH) -> str | None:
    """Make an environment unless it is there with the right version of its package.

    Args:
      torch: Version; one with "+cpu" has to be known to the package index that pip is configured with.

    Returns:
      None, or why it cannot be made.
    """
    environment, python = ENVIRONMENTS[name], python_of(home, name)
    if installed_version(python, environment.package) == environment.version:
        return None
    home.mkdir(parents=True, exist_ok=True)
    constraints = home / f"v_{name}.constraints.txt"
    pins = [*environment.constraints, *([f"torch=={torch}"] if environment.torch else [])]
    constraints.write_text("\n".join(pins) + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    try:
        _run([sys.executable, "-m", "venv", str(python.parents[1])])
        if environment.torch:  # first and alone: a package that asks for torch would choose the build itself
            _run([*pip, "torch"])
        _install(pip, python, environment)
        if environment.also:
            _run([*pip, *environment.also])
    except RuntimeError as error:
        return str(error)
    return None


def _install(pip: list[str], python: Path, environment: Environment) -> None:
    target = f"{environment.package}=={environment.version}"
    if not environment.not_required:
        _run([*pip, target])
        return
    _run([*pip, "--no-deps", target])
    wanted = _run([str(python), "-c", _REQUIREMENTS, environment.package, *environment.not_required]).split("\n")
    _run([*pip, "setuptools", *(line for line in wanted if line)])


def installed_version(python: Path, package: str) -> str | None:
    """Version of a package in the environment of an interpreter; None where either is missing."""
    if not python.exists():
        return None
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    found = subprocess.run([str(python), "-c", code, package], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{' '.join(command[:6])} ...: {lines[-1]}")
    return done.stdout
