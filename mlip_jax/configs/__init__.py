"""The shipped configs in a checkout, where their files are in the folder configs/ at the top of the repository.

This file makes them importable as `mlip_jax.configs` there. An installed package has the files here, in its place:
see `package-dir` in pyproject.toml.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "configs")]
