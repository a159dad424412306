"""Errors of a force field on the test molecules of a split by record.

    python benchmarks/unseen.py runs/qcr MORE.lmdb --split=split.json \\
        --options="stages=('DFT_1st','DFT_2nd'); level_of_theory=GFN2-xTB"

split.json contains {"train": [record, ...], "valid": [...], "test": [...]}; benchmarks/join.py
excludes "test" and "valid" from the training data. The script prints mean absolute errors of
--structures random structures of the test split, in total and per subset.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.join import molecules
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.source import reader_options
from mlip_jax.importers import load_force_field
from mlip_jax.simulation.energies import energies_and_forces


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("force_field")
    parser.add_argument("data")
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--options", default="", help="options of the reader")
    parser.add_argument("--structures", type=int, default=2_500)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    potential, test = load_force_field(a.force_field), set(json.loads(a.split.read_text())["test"])
    structures = [
        s
        for record, group in molecules(a.data, reader_options(a.options))
        if record in test
        for s in group
        if set(s.numbers.tolist()) <= set(potential.elements)
    ]
    if not structures:
        sys.exit(
            f"{a.data}: every structure of the test split of {a.split} contains elements that the "
            "force field was not trained on"
        )
    order = np.random.default_rng(a.seed).permutation(len(structures))
    chosen = [structures[i] for i in order[: a.structures]]
    energies, forces = energies_and_forces(
        potential, Columns.from_structures(chosen), np.arange(len(chosen))
    )
    sizes, subsets = (
        np.array([len(s.numbers) for s in chosen]),
        np.array([s.subset for s in chosen]),
    )
    energy = 1e3 * np.abs(energies - [s.energy for s in chosen]) / sizes
    force = 1e3 * np.abs(forces - np.concatenate([s.forces for s in chosen]))
    print(f"{len(chosen)} structures of {len({s.record for s in chosen})} molecules")
    for name in ("", *sorted(set(subsets))):
        rows = (subsets == name) if name else np.ones(len(chosen), bool)
        print(
            f"{name or 'all'}: {rows.sum()} structures, {energy[rows].mean():.2f} meV/atom, "
            f"{force[np.repeat(rows, sizes)].mean():.1f} meV/Å"
        )


if __name__ == "__main__":
    main()
