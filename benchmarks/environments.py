"""Virtual environments of other packages, one per package, because their requirements conflict."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TORCH = "2.13.0+cpu"


class Environment(NamedTuple):
    """Packages of a virtual environment.

    Attributes:
      package: Name of the package to measure.
      version: Version of the package.
      torch: Whether it requires PyTorch.
      constraints: Further pins.
      not_required: Requirements of the package to omit, because they exclude the pinned PyTorch.
      also: Further packages, pinned.
      python: Oldest version of Python that the package supports.
    """

    package: str
    version: str
    torch: bool = True
    constraints: tuple[str, ...] = ()
    not_required: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    python: tuple[int, int] = (3, 11)


ENVIRONMENTS = {
    "spk": Environment(
        "schnetpack", "2.1.1", constraints=("setuptools<81",), not_required=("sympy",)
    ),
    # torch-sim relaxes with SchNetPack's PaiNN
    "ts": Environment(
        "schnetpack",
        "2.1.1",
        constraints=("setuptools<81",),
        not_required=("sympy",),
        also=("torch-sim-atomistic==0.6.2",),
        python=(3, 12),
    ),
    "tmd": Environment("torchmd-net", "3.1.0"),
    "mace": Environment("mace-torch", "0.3.16"),
    "nequip": Environment("nequip", "0.19.1", also=("nequip-allegro==0.8.3",)),
    "sevenn": Environment("sevenn", "0.13.0"),
    "pyg": Environment("torch-geometric", "2.8.1", also=("sympy", "scipy")),
    # FAENet needs torch-scatter, which has no wheels: peers/run_faenet.py replaces its only function
    "faenet": Environment("faenet", "0.1.3", also=("torch-geometric==2.8.1", "pandas", "scipy")),
    "mlip": Environment("mlip", "0.2.5", torch=False),
}

_REQUIREMENTS = """
import importlib.metadata, re, sys
for line in importlib.metadata.requires(sys.argv[1]) or []:
    if "extra ==" not in line and re.match(r"[\\w.-]+", line)[0] not in sys.argv[2:]:
        print(line)
"""


def python_of(home: Path, name: str) -> Path:
    """Return the path of the interpreter of an environment."""
    return home / f"v_{name}" / "bin" / "python"


def make(home: Path, name: str, torch: str = TORCH) -> str | None:
    """Create an environment, unless it exists with the right version of its package.

    Args:
      home: Folder of the environments.
      name: Key of ENVIRONMENTS.
      torch: Version of PyTorch. One with "+cpu" must be on the package index that pip is configured
        with. If another version of Python is required, for which the index may have no such build,
        the default build of the same version is installed.

    Returns:
      None, or the reason why the environment cannot be created.
    """
    environment, python = ENVIRONMENTS[name], python_of(home, name)
    if installed_version(python, environment.package) == environment.version:
        return None
    try:
        interpreter = interpreter_for(environment.python)
    except RuntimeError as error:
        return str(error)
    if interpreter != sys.executable:
        torch = torch.removesuffix("+cpu")
    home.mkdir(parents=True, exist_ok=True)
    constraints = home / f"v_{name}.constraints.txt"
    pins = [*environment.constraints, *([f"torch=={torch}"] if environment.torch else [])]
    constraints.write_text("\n".join(pins) + "\n")
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        str(constraints),
    ]
    try:
        _run([interpreter, "-m", "venv", str(python.parents[1])])
        # Install torch first: packages that require torch would choose the build themselves.
        if environment.torch:
            _run([*pip, "torch"])
        _install(pip, python, environment)
        if environment.also:
            _run([*pip, *environment.also])
    except RuntimeError as error:
        return str(error)
    return None


def interpreter_for(oldest: tuple[int, int]) -> str:
    """Return this interpreter if it is new enough, otherwise one on the PATH or from pyenv.

    Raises:
      RuntimeError: No interpreter is new enough.
    """
    if sys.version_info >= oldest:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(oldest[1], oldest[1] + 4)]
    of_pyenv = sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin/python"))
    for candidate in [*filter(None, map(shutil.which, names)), *map(str, of_pyenv)]:
        code = "import sys; print(sys.version_info[0], sys.version_info[1])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and tuple(map(int, done.stdout.split())) >= oldest:
            return candidate
    raise RuntimeError(f"no Python {oldest[0]}.{oldest[1]} or newer found. Install one.")


def _install(pip: list[str], python: Path, environment: Environment) -> None:
    target = f"{environment.package}=={environment.version}"
    if not environment.not_required:
        _run([*pip, target])
        return
    _run([*pip, "--no-deps", target])
    requirements = _run(
        [str(python), "-c", _REQUIREMENTS, environment.package, *environment.not_required]
    ).split("\n")
    _run([*pip, "setuptools", *(line for line in requirements if line)])


def installed_version(python: Path, package: str) -> str | None:
    """Return the version of a package in an environment, None if either is missing."""
    if not python.exists():
        return None
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    done = subprocess.run([str(python), "-c", code, package], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{' '.join(command[:6])} ...: {lines[-1]}")
    return done.stdout
