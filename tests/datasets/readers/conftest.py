"""A small data file for each reader, created by tests/datasets/readers/samples/<reader>.py."""

import importlib.util
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Return sample(name) -> (path, options), the result of `make(folder)` in samples/<name>.py.

    sample.modules contains the module of each sample by name.
    """
    samples, modules = {}, {}

    def load(name):
        if name not in samples:
            spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            modules[name] = module
            samples[name] = module.make(tmp_path_factory.mktemp(name))
        return samples[name]

    load.modules = modules
    return load
