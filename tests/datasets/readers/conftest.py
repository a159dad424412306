"""A small data file for each reader, made or cut out by tests/datasets/readers/samples/<reader>.py."""

import importlib.util
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """sample(name) -> (path, options): what samples/<name>.py `make(folder)` returns."""
    made = {}

    def load(name):
        if name not in made:
            spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            made[name] = module.make(tmp_path_factory.mktemp(name))
        return made[name]

    return load
