"""Tests for the task `export`: all files, and errors."""

from __future__ import annotations

import json

import jax
import jax.export
import numpy as np
import pytest

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.config import ConfigError
from mlip_jax.defaults import export_defaults
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import FILE, Domain
from mlip_jax.tasks import export
from mlip_jax.workdir import WorkdirError
from tests.tasks.property_runs import write_force_field


def config(force_field, **changes):
    c = export_defaults()
    c.force_field = str(force_field)
    c.update(changes)
    return c


def test_export_and_read_back(tmp_path):
    write_force_field(tmp_path / "ff")
    known = Domain.fit(np.eye(8), 2 * np.eye(8), {})
    known.save(tmp_path / "ff" / FILE)
    export.run(config(tmp_path / "ff", max_atoms=9, platforms=("cpu",)), tmp_path / "out")
    about = json.loads((tmp_path / "out/force_field.json").read_text())
    original = Potential.load(tmp_path / "ff")
    assert (
        about["rows"] == 10
        and about["platforms"] == ["cpu"]
        and about["force_field"] == original.digest()
    )
    jax.export.deserialize(bytearray((tmp_path / "out/force_field.stablehlo").read_bytes()))
    back = load_force_field(f"parameters:{tmp_path / 'out'}")
    assert back.digest() == original.digest() and back.metadata == original.metadata
    np.testing.assert_array_equal(back.reference_energies, original.reference_energies)
    # exported force fields had no domain, and gave no warnings
    assert atom_domain.load_domain(f"parameters:{tmp_path / 'out'}").border == known.border
    with pytest.raises(WorkdirError, match="max_atoms: 9 -> 10"):
        export.run(config(tmp_path / "ff", max_atoms=10, platforms=("cpu",)), tmp_path / "out")


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="force_field is required"):
        export.run(config(""), tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such directory"):
        export.run(config(tmp_path / "nothing"), tmp_path / "out")
    write_force_field(tmp_path / "ff")
    with pytest.raises(ValueError, match="max_atoms"):
        export.run(config(tmp_path / "ff", max_atoms=0), tmp_path / "out")
    # the folder is released
    export.run(config(tmp_path / "ff", max_atoms=4, platforms=("cpu",)), tmp_path / "out")
