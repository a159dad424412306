"""Join data sets in one file of SPICE's layout, without the test molecules of a force field.

    python benchmarks/join.py JOINED.hdf5 MORE.lmdb SPICE.hdf5 'runs/geom_drugs/data/*.hdf5' \\
        --options="stages=('DFT_1st','DFT_2nd'); level_of_theory=GFN2-xTB" \\
        --without=MORE.lmdb:split.json

All labels must be from one level of theory (GFN2-xTB in the benchmarks). --without=FILE:SPLIT.json
excludes molecules of the "test" and "valid" splits from all data sets; molecules are identified by
their connectivity without stereochemistry. --options are the options of the reader of the first
data set; --conformers is the maximum number of conformers per molecule of the other data sets.
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
    """Yield (record, structures with energy and forces) for each record of a data set."""
    with readers.open_data(path, **options) as source:
        last, structures = None, []
        for s in source:
            if last is not None and s.record != last:
                yield last, structures
                structures = []
            last = s.record
            if s.forces is not None and np.isfinite(s.energy) and np.isfinite(s.forces).all():
                structures.append(s)
        if last is not None:
            yield last, structures


def skeletons(groups):
    entries = [IdentityQuery(g[0].smiles, g[0].numbers, g[0].positions) for g in groups]
    return [None if d is None else d.skeleton for d in describe(entries, len(entries))]


def held_out(text, options):
    """Return the skeletons of the molecules in the test and validation splits of a file."""
    path, _, split = text.rpartition(":")
    parts = json.loads(Path(split).read_text())
    records = {*parts["test"], *parts["valid"]}
    return set(skeletons([g for record, g in molecules(path, options) if record in records and g]))


def write(file, name, group):
    """Write a molecule in bohr, hartree and hartree/bohr; return its number of structures."""
    first = group[0]
    same = [s for s in group if np.array_equal(s.numbers, first.numbers)]
    target = file.create_group(name)
    target["atomic_numbers"] = first.numbers.astype(np.int16)
    target["smiles"], target["subset"] = [first.smiles], [first.subset]
    for key, unit, values in (
        ("conformations", "bohr", np.array([s.positions / Bohr for s in same], np.float32)),
        ("dft_total_energy", "hartree", np.array([s.energy / Hartree for s in same])),
        (
            "dft_total_gradient",
            "hartree/bohr",
            np.array([-s.forces * Bohr / Hartree for s in same], np.float32),
        ),
    ):
        target[key] = values
        target[key].attrs["units"] = unit
    return len(same)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("data", nargs="+", help="files or patterns")
    parser.add_argument("--options", default="", help="options of the reader of the first data set")
    parser.add_argument("--without", action="append", default=[], metavar="FILE:SPLIT.json")
    parser.add_argument(
        "--conformers",
        type=int,
        default=None,
        help="maximum number of conformers per molecule of the other data sets",
    )
    parser.add_argument("--level_of_theory", default="GFN2-xTB")
    a = parser.parse_args()
    if a.output.exists():
        sys.exit(f"{a.output}: exists already. Choose another name.")
    first = reader_options(a.options)
    out = set().union(*(held_out(text, first) for text in a.without))
    with h5py.File(a.output, "w") as file:
        file.attrs["level_of_theory"] = a.level_of_theory
        for number, path in enumerate(a.data):
            groups = [g for _, g in molecules(path, first if number == 0 else {}) if g]
            max_conformers = None if number == 0 else a.conformers
            kept = total = unknown = 0
            for index, (group, skeleton) in enumerate(zip(groups, skeletons(groups))):
                unknown += skeleton is None  # it may be a test molecule
                if skeleton is not None and skeleton not in out:
                    total += write(file, f"{number}-{index:07d}", group[:max_conformers])
                    kept += 1
            print(
                f"{path}: {total} structures of {kept} molecules; held out: "
                f"{len(groups) - kept - unknown}; not readable by RDKit: {unknown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
