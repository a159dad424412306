"""What tests of the loop share; its programs are compiled once for all of them."""

import types

import pytest

from mlip_jax.training import loop as module
from mlip_jax.training.step import Trainer
from tests.training.world import World


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture
def stop_at(monkeypatch):
    """Has a signal come when the call that reaches step `stop_at.step` is made; None: never."""
    wish = types.SimpleNamespace(step=None, loop=None)
    begun, real = [], Trainer.train

    class Signal:
        def __enter__(self):
            begun.clear()
            return self

        def __exit__(self, *_):
            pass

        @property
        def received(self):
            return "SIGTERM" if wish.step is not None and sum(begun) >= wish.step else None

    def train(self, state, inputs, count=1, **options):
        begun.append(count)
        return real(self, state, inputs, count, **options)

    monkeypatch.setattr(module.distributed, "StopSignal", Signal)
    monkeypatch.setattr(Trainer, "train", train)
    return wish


@pytest.fixture
def watched(monkeypatch):
    """Parameters, average and whether all was finite after each update of trainers that do one a call."""
    states, real = [], Trainer.train

    def train(self, state, inputs, count=1, **options):
        state, result = real(self, state, inputs, count, **options)
        states.append(
            (self.single(state.params), self.single(state.ema), bool(self.single(result.finite)[0]))
        )
        return state, result

    monkeypatch.setattr(Trainer, "train", train)
    return states
