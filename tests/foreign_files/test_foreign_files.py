"""Tests for JSON, YAML and npz files of other people: no hang, no large cost, one kind of error."""

import os

import numpy as np
import pytest

from mlip_jax import limits
from mlip_jax.checkpoint import CheckpointError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import split_files
from mlip_jax.foreign_files import archives, texts
from mlip_jax.importers.formats import mlff_settings, torchmdnet_settings, weights
from mlip_jax.label_budget.columns_file import load_columns
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.simulation.trust.ensemble_calibration import Calibration
from mlip_jax.simulation.trust.intervals import ValidationErrors

DEEP = "[" * 100_000
LEVELS = "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12))
COPIES = f"a0: &a0 [x]\n{LEVELS}"
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}\n" for k in range(1, 12)
)


def bomb(path, monkeypatch):
    """Write an npz file that expands by a factor of several hundred."""
    monkeypatch.setattr(limits, "SMALL", 1000)
    np.savez_compressed(path, train=np.zeros(200_000), points=np.zeros(200_000))
    assert path.stat().st_size < 5000
    return path


@pytest.mark.parametrize("text", ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x"])
def test_values_in_yaml_that_contradict_their_tags_are_errors(text):
    """Detects errors of PyYAML that readers do not expect, such as KeyError: 'x'."""
    with pytest.raises(ValueError, match="another type"):
        texts.parse_yaml(text.encode())


def test_plain_files_are_read(tmp_path):
    text = b"\xef\xbb\xbfa: &a [1, 2]\nb: *a\nc: {<<: {d: 2.5}}\n"
    assert texts.parse_yaml(text) == {"a": [1, 2], "b": [1, 2], "c": {"d": 2.5}}
    assert texts.parse_yaml(b"") is None
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    with archives.open_npz(tmp_path / "a.npz") as file:
        assert file["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", [COPIES, MERGES, "a: &a [*a]\n", DEEP, "!!python/name:os.system"])
@pytest.mark.parametrize(
    "read",
    [weights.read_yaml, torchmdnet_settings.read_hparams, mlff_settings.read_hyperparameters],
)
def test_references_in_yaml_are_no_bombs(tmp_path, text, read):
    """Detects 9¹¹ values from 400 bytes, which a message prints or a merge key copies."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        read(path)


def test_long_numbers_in_yaml_are_rejected():
    """A number with 500,000 digits to base 60 took 45 s."""
    with pytest.raises(ValueError, match="a number of 40,001 characters"):
        texts.parse_yaml(b"a: 1" + b":1" * 20_000)


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (weights.read, weights.WeightsError),
        (lambda path: split_files.read_split_file(path), DatasetError),
        (load_columns, CheckpointError),
        (Domain.load, CheckpointError),
        (ValidationErrors.load, CheckpointError),
    ],
)
def test_archives_are_no_bombs(tmp_path, monkeypatch, read, error):
    """Detects gigabytes of zeros from a file of megabytes."""
    with pytest.raises(error, match="bytes per compressed byte"):
        read(bomb(tmp_path / "a.npz", monkeypatch))


def test_nested_json_is_an_error_of_its_reader(tmp_path):
    (tmp_path / "a.json").write_text(DEEP)
    with pytest.raises(DatasetError, match="nested too deeply"):
        split_files.read_split_file(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not a valid ensemble calibration"):
        Calibration.load(tmp_path / "a.json")


@pytest.mark.parametrize("read", [weights.read_yaml, texts.read_bytes, load_columns])
def test_pipes_are_not_opened(tmp_path, read):
    """Detects an endless wait for the writer of a pipe."""
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises((OSError, ValueError, CheckpointError), match="expected a file"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("name", "values"),
    [("points", np.full((9, 4), "a")), ("center", np.zeros(3)), ("edges", np.zeros((2, 2)))],
)
def test_arrays_of_another_kind_are_corrupted(tmp_path, name, values):
    """The first distance raised an error of NumPy's arithmetic without the name of the file."""
    rng = np.random.default_rng(0)
    fit = Domain.fit(rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), {"a": np.ones(9)})
    fit.save(tmp_path / "domain.npz")
    assert Domain.load(tmp_path / "domain.npz").border == fit.border
    with np.load(tmp_path / "domain.npz") as stored:
        np.savez(tmp_path / "domain.npz", **{**stored, name: values})
    with pytest.raises(CheckpointError, match=f"{name}: expected an array of shape"):
        Domain.load(tmp_path / "domain.npz")


def test_predictions_of_other_properties_are_corrupted(tmp_path):
    labels = {"gap": np.zeros(3)}
    ValidationErrors(np.arange(3), np.zeros(3), labels, labels).save(tmp_path / "a.npz")
    assert ValidationErrors.load(tmp_path / "a.npz").labels.keys() == {"gap"}
    ValidationErrors(np.arange(3), np.zeros(3), labels, {}).save(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match="different properties"):
        ValidationErrors.load(tmp_path / "a.npz")
