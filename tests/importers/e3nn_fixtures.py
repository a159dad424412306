"""Fixtures of reference programs on e3nn: weights, arguments, structures and their results.

Each file has `config`, the arguments of the constructor, the state dict under "weights/", five
molecules under "structures/" and, for some, a crystal under "periodic/", smaller than the cutoff.
Energies are in eV, forces in eV/Å, the stress in eV/Å³.
"""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import evaluate
from mlip_jax.structure import Structure

DATA = Path(__file__).parents[1] / "data"


class Fixture(NamedTuple):
    """Contents of a file; energies (S,), forces of all atoms, stress of the crystal or None."""

    state: dict
    config: dict
    structures: list
    energies: np.ndarray
    forces: np.ndarray
    stress: np.ndarray | None


@functools.cache
def read(name: str) -> Fixture:
    """Read tests/data/parity_NAME.npz."""
    with np.load(DATA / f"parity_{name}.npz", allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files}
    groups = sorted({key.rsplit("/", 1)[0] for key in arrays if key.endswith("/numbers")})
    crystals = [g for g in groups if g.startswith("periodic")]
    groups = sorted(groups, key=lambda g: g in crystals)
    structures = [
        Structure(
            arrays[f"{g}/numbers"],
            arrays[f"{g}/positions"],
            cell=arrays.get(f"{g}/cell"),
            pbc=np.ones(3, bool) if g in crystals else None,
        )
        for g in groups
    ]
    return Fixture(
        {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")},
        ast.literal_eval(str(arrays["config"])),
        structures,
        np.concatenate([arrays[f"{g}/energy"] for g in groups]),
        np.concatenate([arrays[f"{g}/forces"] for g in groups]),
        arrays[f"{crystals[0]}/stress"] if crystals else None,
    )


def results(potential, fixture: Fixture, dtype=np.float64, derivatives=True, undirected=True):
    """Energies, forces and stress of all structures in one padded batch."""
    columns = Columns.from_structures(fixture.structures)
    sizes = graph_sizes(columns, potential.cutoff)
    num = len(fixture.structures)
    budget = PaddingBudget(int(sizes.n_node.sum()) + 3, int(sizes.n_edge.sum()) + 6, num + 2)
    batch = build_batch(columns, budget, potential.cutoff, dtype=dtype)
    params = jax.tree.map(lambda p: np.asarray(p, dtype), potential.params)
    model = potential.model.clone(undirected=undirected)
    stress = derivatives and fixture.stress is not None
    result = jax.jit(
        lambda p, g: evaluate(model, p, g, potential.energy_scale, stress, derivatives)
    )(params, batch)
    references = [potential.reference_energies[s.numbers].sum() for s in fixture.structures]
    return (
        np.asarray(result.energy, np.float64)[:num] + references,
        np.asarray(result.forces)[: len(fixture.forces)],
        np.asarray(result.stress)[num - 1] if stress else None,
    )


def assert_agree(found, fixture: Fixture, relative: float):
    """Check energies, forces and stress relative to the largest value of each."""
    for values, expected in zip(found, (fixture.energies, fixture.forces, fixture.stress)):
        if expected is not None:
            tolerance = relative * np.abs(expected).max()
            np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
