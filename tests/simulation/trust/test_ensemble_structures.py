"""Tests for the choice of structures that calibrate an ensemble."""

import types

import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.simulation.trust import ensemble_structures
from mlip_jax.structure import Structure

MOLECULE = np.arange(100) // 2  # two conformers each
STORE = types.SimpleNamespace(index=lambda name: MOLECULE, digest=lambda: "store")


def runs(monkeypatch, **parts):
    """Replace the data of runs; `parts` are the splits of each run by its name."""

    def load(workdir):
        splits = {k: np.asarray(v, np.int64) for k, v in parts[workdir].items()}
        seen = np.concatenate([splits["train"], splits["valid"]])
        return types.SimpleNamespace(store=STORE, parts=splits, workdir=workdir, seen=lambda: seen)

    monkeypatch.setattr(ensemble_structures.RunData, "load", load)

    def take(indices, labels_only):
        return Columns.from_structures(
            [Structure(np.ones(1, int), np.zeros((1, 3)))] * len(indices)
        )

    monkeypatch.setattr(STORE, "take", take, raising=False)
    member = types.SimpleNamespace(elements=(1,))
    return list(parts), [member] * len(parts)


def test_the_split_that_chose_the_checkpoint_does_not_calibrate(monkeypatch):
    """Detects a calibration to the validation errors of the first member, which are too small."""
    first = {"train": range(20), "valid": range(20, 30), "test": range(30, 100)}
    other = {"train": range(20), "valid": [98, 99], "test": []}
    chosen = ensemble_structures.choose(*runs(monkeypatch, a=first, b=other), 100)
    fit, check = chosen.indices["calibration"], chosen.indices["test"]
    assert chosen.part == "test" and min(len(fit), len(check)) >= 30
    assert sorted([*fit, *check]) == list(range(30, 98))  # without validation structures of b
    assert not set(MOLECULE[fit]) & set(MOLECULE[check])


@pytest.mark.parametrize("test", [[], range(90, 100)])
def test_a_small_test_split_is_replaced_by_the_validation_split(monkeypatch, test):
    splits = {"train": range(20), "valid": range(20, 90), "test": test}
    chosen = ensemble_structures.choose(*runs(monkeypatch, a=splits, b=splits), 100)
    assert chosen.part == "valid" and chosen.indices["calibration"].tolist() == list(range(20, 90))
    assert chosen.indices.get("test", np.zeros(0)).tolist() == list(test)
    assert "may be too small" in chosen.notes[0]
    splits["valid"] = []
    with pytest.raises(DatasetError, match="split 'valid' contains no structure"):
        ensemble_structures.choose(*runs(monkeypatch, a=splits, b=splits), 100)
