"""Tests for the audit: its geometries, the faults that it must find, and its report."""

import json

import numpy as np
import pytest
from ase import Atoms
from ase.data import vdw_radii

from mlip_jax import audit
from mlip_jax.config import ConfigError
from mlip_jax.defaults import audit_defaults
from mlip_jax.potential import Potential
from mlip_jax.simulation.audit import audit as module
from mlip_jax.simulation.audit import geometries
from mlip_jax.tasks import audit as task
from tests.simulation.analytic import Springs, pairwise

pytest.importorskip("rdkit")


def springs(**options) -> Potential:
    model = Springs(**options)
    return Potential(model, {}, model.cutoff, np.zeros(119), 1.0, (1, 6))


def test_bond_scan_moves_one_side():
    scan = geometries.bond_scan("ethanol C–C", "CCO", (0, 1))
    assert len(scan.moving) == 5 and 0 not in scan.moving  # C, O and three H
    lengths = [atoms.get_distance(0, 1) for atoms in scan.frames]
    np.testing.assert_allclose(lengths, scan.x)
    inner = [atoms.get_distance(1, 2) for atoms in scan.frames]
    np.testing.assert_allclose(inner, inner[0])


def test_torsion_scan_turns_one_side():
    scan = geometries.torsion_scan("butane", "CCCC", (0, 1, 2, 3))
    angles = [atoms.get_dihedral(0, 1, 2, 3) for atoms in scan.frames]
    np.testing.assert_allclose(np.cos(np.deg2rad(angles)), np.cos(np.deg2rad(scan.x)), atol=1e-8)
    lengths = np.array([atoms.get_distance(2, 3) for atoms in scan.frames])
    np.testing.assert_allclose(lengths, lengths[0])


def test_dimers_have_the_stated_distances():
    scan = geometries.dimer_scan("benzene, methane", "c1ccccc1", "C")
    for scale, atoms in zip((*scan.x, 5.0), scan.frames):
        between = atoms.get_all_distances()[:12, 12:]
        contact = vdw_radii[atoms.numbers[:12]][:, None] + vdw_radii[atoms.numbers[12:]]
        ratio = (between / contact).min()
        assert ratio > 5 if scale == 5.0 else abs(ratio - scale) < 0.01


def test_distance_out_of_plane():
    atoms = Atoms("C4H", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0.4], [0, 0, 9]])
    assert geometries.out_of_plane(Atoms("C4", atoms.positions[[0, 1, 2, 2]])) < 1e-12
    assert 0.05 < geometries.out_of_plane(atoms) < 0.2


@pytest.mark.filterwarnings("ignore:the forces of this force field are not the gradient")
def test_forces_that_are_no_derivative_are_found():
    """Other elements are skipped by name; nothing is compared without a reference."""
    scores = {}
    for name, potential in {
        "gradient": springs(direct_forces=False),
        "other forces": springs(),
    }.items():
        result = audit(potential, checks=("bonds",), reference="none")
        assert [row["molecule"] for row in result.checks["bonds"].rows] == [
            "ethane C–C",
            "ethene C=C",
        ]
        assert len(result.checks["bonds"].skipped) == 6 and "fluoromethane" in str(
            result.checks["bonds"].skipped
        )
        scores[name] = result.scores["largest force error (eV/Å)"]
    assert scores["gradient"] < 1e-6 and scores["other forces"] > 0.1


def test_invalid_options_are_errors(tmp_path):
    with pytest.raises(ValueError, match="checks must be some of bonds.*received rotors"):
        audit(springs(), checks=("rotors",))
    with pytest.raises(ValueError, match="picoseconds must be positive"):
        audit(springs(), picoseconds=0)
    config = audit_defaults()
    config.force_field = ""
    with pytest.raises(ConfigError, match="force_field is required"):
        task.run(config, tmp_path)


@pytest.mark.slow  # figures, dynamics
def test_the_task_writes_all_checks(tmp_path, monkeypatch):
    """A missing reference method is a note, and molecules without known elements are omitted."""
    potential = pairwise("harmonic", elements=(1, 6), length=1.5, stiffness=1.0)
    monkeypatch.setattr(module, "load_mean_force_field", lambda given: potential)
    monkeypatch.setattr(
        module, "Method", lambda *_: (_ for _ in ()).throw(ImportError("no tblite here"))
    )
    config = audit_defaults()
    config.num_conformers, config.picoseconds, config.force_field = 2, 0.1, "harmonic"
    page = task.run(config, tmp_path / "run").read_text()
    content = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "no tblite here" in page and "no tblite here" in content["notes"][0]
    assert list(content["checks"]) == list(config.checks)
    assert content["checks"]["torsions"]["rows"][0]["error (meV)"] is None
    assert "mean error of torsions (meV)" not in content["scores"]
    assert content["scores"]["largest force error (eV/Å)"] < 1e-3
