"""Tests for exported StableHLO: energies and forces in a program without this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import jax
import jax.export
import numpy as np
import pytest
from ase.build import molecule
from ase.neighborlist import neighbor_list

from mlip_jax.graphs.neighbors import long_range_list
from mlip_jax.potential import Potential
from mlip_jax.simulation import export
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.export import default_pairs, export_stablehlo
from tests.simulation.structures import crystal, random_molecule

# modules that a user of the file does not have, besides this package
HIDDEN = ("mlip_jax", "flax", "jraph", "e3x", "ase", "safetensors", "orbax")


def example() -> str:
    """Return the program in the module's docstring."""
    match = re.search(r"    import json\n.*?(?=\n\n`rows`)", export.__doc__, re.DOTALL)
    return textwrap.dedent(match.group())


def test_runs_with_only_jax(make_potential, tmp_path):
    atoms = molecule("CH3CH2OH")
    folder = export_stablehlo(make_potential("tiny"), tmp_path / "exported", max_atoms=12)
    np.savez(folder / "atoms.npz", positions=atoms.positions, numbers=atoms.numbers)
    script = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ImportError(f"{{name}} is hidden")
sys.meta_path.insert(0, Hidden())
import numpy as np
atoms = np.load("atoms.npz")
positions, numbers = atoms["positions"], atoms["numbers"]
{example()}
assert not {set(HIDDEN)!r} & set(sys.modules)
np.savez("out.npz", energy=energy, forces=forces)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out, calculator = np.load(folder / "out.npz"), MLIPCalculator(make_potential("tiny"))
    assert float(out["energy"]) == pytest.approx(calculator.get_property("energy", atoms), abs=1e-5)
    np.testing.assert_allclose(out["forces"], calculator.get_property("forces", atoms), atol=1e-5)


def evaluate_file(folder, atoms):
    """Return the outputs of the exported function, without reference energies, from ASE's
    neighbors.
    """
    about = json.loads((folder / "force_field.json").read_text())
    real, last = np.dtype(about["dtype"]), about["rows"] - 1
    given = {
        "positions": padded(atoms.positions, about["rows"], 0, real),
        "num_atoms": np.int32(len(atoms)),
        "numbers": padded(atoms.numbers, about["rows"], 0, np.int32),
        "charge": np.zeros((), real),
        "num_unpaired_electrons": np.zeros((), real),
    }
    i, j, shifts = neighbor_list("ijS", atoms, about["cutoff"])
    once = [(a, *s) < (b, *-s) if a != b else tuple(s) > (0, 0, 0) for a, b, s in zip(i, j, shifts)]
    given["pairs"] = padded(np.stack([i, j], 1)[once], about["max_pairs"], last, np.int32)
    if "max_long_range_pairs" in about:
        reach = about["long_range_cutoff"] or np.inf
        i, j, _ = long_range_list(atoms.positions, reach)
        given["long_range_pairs"] = padded(
            np.stack([i, j], 1), about["max_long_range_pairs"], last, np.int32
        )
    if about["periodic"]:
        given["shifts"] = padded(shifts[once], about["max_pairs"], 0, np.int32)
        given["cell"] = atoms.cell.array.astype(real)
    assert {n: (list(v.shape), str(v.dtype)) for n, v in given.items()} == {
        n: (i["shape"], i["dtype"]) for n, i in about["inputs"].items()
    }
    exported = jax.export.deserialize(bytearray((folder / "force_field.stablehlo").read_bytes()))
    with jax.enable_x64(real == np.float64):
        out = jax.device_get(exported.call(given))
    assert {n: list(v.shape) for n, v in out.items()} == {
        n: o["shape"] for n, o in about["outputs"].items()
    }
    return out


def padded(values, size, fill, dtype):
    assert len(values) <= size
    out = np.full((size, *values.shape[1:]), fill, dtype)
    out[: len(values)] = values
    return out


def compare(potential: Potential, out, atoms, tolerance):
    calculator, n = MLIPCalculator(potential, "float64"), len(atoms)
    reference = potential.reference_energies[atoms.numbers]
    np.testing.assert_allclose(
        out["forces"][:n], calculator.get_property("forces", atoms), atol=tolerance
    )
    np.testing.assert_allclose(
        out["energies"][:n] + reference, calculator.get_property("energies", atoms), atol=tolerance
    )
    assert out["energy"] == pytest.approx(float(out["energies"].sum()), abs=tolerance)
    assert (out["forces"][n:] == 0).all() and (out["energies"][n:] == 0).all()
    if atoms.pbc.all():
        stress = calculator.get_property("stress", atoms)
        np.testing.assert_allclose(
            out["stress"][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], stress, atol=tolerance
        )


def test_periodic_in_float64(make_potential, tmp_path):
    """A cell smaller than the cutoff: atoms are neighbors of their own images."""
    potential = make_potential("tiny")
    export_stablehlo(
        potential,
        tmp_path,
        max_atoms=6,
        periodic=True,
        dtype="float64",
        platforms=["cpu"],
        max_pairs=999,
    )
    compare(potential, evaluate_file(tmp_path, crystal(3.0)), crystal(3.0), 1e-10)


@pytest.mark.slow
def test_long_range_terms(make_potential, tmp_path):
    potential = make_potential("charged")
    export_stablehlo(potential, tmp_path, max_atoms=9, dtype="float64")
    for n in (5, 9):
        atoms = random_molecule(n)
        compare(potential, evaluate_file(tmp_path, atoms), atoms, 1e-10)


def test_capacity_for_pairs():
    assert default_pairs(10, np.inf, False) == 45 and default_pairs(1, 5.0, False) == 1
    assert default_pairs(1000, 5.0, False) == default_pairs(1000, 5.0, True) == 39270
    assert default_pairs(10, 5.0, False) == 45 < default_pairs(10, 5.0, True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_atoms": 0}, "max_atoms must be at least 1, received 0"),
        ({"max_pairs": 0}, "max_pairs must be"),
        ({"dtype": "float16"}, "received 'float16'"),
        ({"platforms": ["abacus"]}, "among cpu.*abacus"),
        ({"periodic": True}, "infinitely many pairs"),
    ],
)
def test_errors(make_potential, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_stablehlo(make_potential("charged"), tmp_path, **{"max_atoms": 4, **options})
    assert not list(tmp_path.iterdir())
