"""Tests for the folder of a run."""

import json

import pytest

from mlip_jax.workdir import write_json


def test_json_is_written_whole_or_not_at_all(tmp_path):
    """A file that is written in place would be left half-written by an error, a kill or a full disk."""
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": 2, "not JSON": object()})
    assert json.loads(path.read_text()) == {"step": 1}
