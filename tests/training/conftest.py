"""Fixtures for tests of the training loop. Their programs are compiled once for all tests."""

import types

import pytest

from mlip_jax.training import loop as module
from mlip_jax.training.step import Trainer
from tests.training.toy import ToyTraining


@pytest.fixture(scope="session")
def toy():
    return ToyTraining()


@pytest.fixture
def stop_at(monkeypatch):
    """Simulate a signal at the dispatch that reaches `stop_at.step`, or never if it is None."""
    wish = types.SimpleNamespace(step=None, loop=None)
    counts, real = [], Trainer.train

    class Signal:
        def __enter__(self):
            counts.clear()
            return self

        def __exit__(self, *_):
            pass

        @property
        def received(self):
            return "SIGTERM" if wish.step is not None and sum(counts) >= wish.step else None

    def train(self, state, inputs, count=1, **options):
        counts.append(count)
        return real(self, state, inputs, count, **options)

    monkeypatch.setattr(module.distributed, "StopSignal", Signal)
    monkeypatch.setattr(Trainer, "train", train)
    return wish


@pytest.fixture
def recorded_steps(monkeypatch):
    """List of (parameters, average, finite) after each step, for one step per dispatch."""
    states, real = [], Trainer.train

    def train(self, state, inputs, count=1, **options):
        state, result = real(self, state, inputs, count, **options)
        states.append(
            (self.single(state.params), self.single(state.ema), bool(self.single(result.finite)[0]))
        )
        return state, result

    monkeypatch.setattr(Trainer, "train", train)
    return states
