"""Several data sets in one file of SPICE's layout, without the molecules that a force field will be tested on.

    python benchmarks/join.py JOINED.hdf5 TRAJECTORIES.lmdb SPICE.hdf5 'runs/geom_drugs/data/*.hdf5' \\
        --options="stages=('DFT_1st','DFT_2nd'); level_of_theory=GFN2-xTB" --without=TRAJECTORIES.lmdb:split.json

All labels must be of one method (the benchmarks have GFN2-xTB everywhere). Molecules are told apart by their
connectivity, stereochemistry aside: --without=FILE:SPLIT.json leaves out those in the parts "test" and "valid" of a
split by record, wherever they stand. --options are those of the reader of the first data set; --conformers takes the
first so many of each molecule of the others.
"""

import argparse
import json
import sys
from pathlib import Path

import h5py
import numpy as np
from ase.units import Bohr, Hartree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlip_jax.datasets import readers
from mlip_jax.datasets.molecules.connectivity import IdentityQuery, describe
from mlip_jax.datasets.source import reader_options


def molecules(path, options):
    """(record, structures) of the records of a data set, one after another."""
    with readers.open_data(path, **options) as source:
        last, found = None, []
        for s in source:
            if last is not None and s.record != last:
                yield last, found
                found = []
            last = s.record
            if s.forces is not None and np.isfinite(s.energy) and np.isfinite(s.forces).all():
                found.append(s)
        if last is not None:
            yield last, found


def skeletons(groups):
    entries = [IdentityQuery(g[0].smiles, g[0].numbers, g[0].positions) for g in groups]
    return [None if d is None else d.skeleton for d in describe(entries, len(entries))]


def held_out(text, options):
    """Skeletons of the molecules of a file that a split does not train on."""
    path, _, split = text.rpartition(":")
    parts = json.loads(Path(split).read_text())
    records = {*parts["test"], *parts["valid"]}
    return set(skeletons([g for record, g in molecules(path, options) if record in records and g]))


def write(file, name, group):
    """One molecule; bohr, hartree and hartree/bohr as in SPICE."""
    first = group[0]
    same = [s for s in group if np.array_equal(s.numbers, first.numbers)]
    to = file.create_group(name)
    to["atomic_numbers"] = first.numbers.astype(np.int16)
    to["smiles"], to["subset"] = [first.smiles], [first.subset]
    for key, unit, values in (
        ("conformations", "bohr", np.array([s.positions / Bohr for s in same], np.float32)),
        ("dft_total_energy", "hartree", np.array([s.energy / Hartree for s in same])),
        (
            "dft_total_gradient",
            "hartree/bohr",
            np.array([-s.forces * Bohr / Hartree for s in same], np.float32),
        ),
    ):
        to[key] = values
        to[key].attrs["units"] = unit
    return len(same)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("data", nargs="+", help="files or patterns")
    parser.add_argument("--options", default="", help="of the reader of the first data set")
    parser.add_argument("--without", action="append", default=[], metavar="FILE:SPLIT.json")
    parser.add_argument(
        "--conformers", type=int, default=None, help="at most, of a molecule of the other data sets"
    )
    parser.add_argument("--level_of_theory", default="GFN2-xTB")
    a = parser.parse_args()
    if a.output.exists():
        sys.exit(f"{a.output} exists already; give another name")
    first = reader_options(a.options)
    out = set().union(*(held_out(text, first) for text in a.without))
    with h5py.File(a.output, "w") as file:
        file.attrs["level_of_theory"] = a.level_of_theory
        for number, path in enumerate(a.data):
            groups = [g for _, g in molecules(path, first if number == 0 else {}) if g]
            most = None if number == 0 else a.conformers
            kept = total = unread = 0
            for place, (group, skeleton) in enumerate(zip(groups, skeletons(groups))):
                unread += skeleton is None  # whether it is to be tested on cannot be told
                if skeleton is not None and skeleton not in out:
                    total += write(file, f"{number}-{place:07d}", group[:most])
                    kept += 1
            print(
                f"{path}: {total} structures of {kept} molecules; held out: {len(groups) - kept - unread}; "
                f"not to be read by RDKit: {unread}",
                flush=True,
            )


if __name__ == "__main__":
    main()
