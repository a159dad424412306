"""The force field that comes with the package: files, errors and speed.

    python benchmarks/bundled.py pack runs/drugs      # writes mlip_jax/force_fields/drugs-gfn2/
    python benchmarks/bundled.py records runs/first   # writes runs/first/split_records.json
    python benchmarks/bundled.py errors runs/first    # errors on the test split
    python benchmarks/bundled.py kinds held.hdf5      # errors by kind on generated molecules
    taskset -c 0 python benchmarks/bundled.py speed   # compared with GFN2-xTB

runs/first and runs/drugs are the workdirs of the two stages of configs/bundled.py. "records" writes
the splits of the first one for data.held_out of the second one. "errors" and "kinds" evaluate the
packed files, or another force field (--force_field). held.hdf5 is a file of configs/generate.py
whose molecules were not used for training.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from ase.data import chemical_symbols

from mlip_jax.datasets import readers
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.molecules.files import from_smiles
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.statistics import Summary
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.importers import load_force_field, parameters
from mlip_jax.importers.catalog.downloads import checksum
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import FILE
from mlip_jax.tasks.force_field_training.preparation import seen_states
from mlip_jax.workdir import write_json

FOLDER = Path(__file__).resolve().parents[1] / "mlip_jax" / "force_fields" / BUNDLED
ATOMS_PER_ELEMENT = 256  # training atoms of the domain, so that the files stay small
STRUCTURES = 1_500  # training and validation structures of the domain
UNSEEN = 120  # molecules of the short table
# known charges; the training data contain others, with too few molecules and too large errors
CHARGES = (-1.0, 0.0, 1.0)
# fewest atoms of known molecules; the training data contain smaller ones, with too large errors
MIN_ATOMS = 5
SIZES = ((0, 15), (15, 25), (25, 35), (35, 50))
MOLECULES = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "sildenafil": "CCCc1nn(C)c2c1nc([nH]c2=O)-c1cc(ccc1OCC)S(=O)(=O)N1CCN(C)CC1",
    "20 alanines": "N" + "C(C)C(=O)N" * 19 + "C(C)C(=O)O",
}


def pack(workdir: Path) -> None:
    """Write parameters and domain of a training run to the folder of the package."""
    potential, data = Potential.load(workdir), RunData.load(workdir)
    rng = np.random.default_rng(0)
    columns = {
        name: data.store.take(np.sort(rng.permutation(data.parts[name])[:STRUCTURES]))
        for name in ("train", "valid")
    }
    valid = columns["valid"]
    _, forces = energies_and_forces(potential, valid, np.arange(len(valid)))
    domain = atom_domain.fit(
        potential, columns["train"], valid, forces - valid.forces, max_per_element=ATOMS_PER_ELEMENT
    )
    summary = Summary(
        columns for _, columns in data.store.chunks(data.parts["train"], labels_only=True)
    )
    metadata = public(potential.metadata, seen_states(summary, None))
    parameters.save(dataclasses.replace(potential, metadata=metadata), FOLDER)
    half = dataclasses.replace(domain, points=domain.points.astype(np.float16))
    half.save(FOLDER / FILE)
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {checksum(path)}")


def public(metadata: dict, states: dict) -> dict:
    """Return metadata without the paths of the machine that trained.

    Args:
      metadata: Metadata of the run. Fine-tuning does not record what the initial force field lacks.
      states: Charges, sizes, and so on, of the training data; charges and sizes of large errors are
        left out.
    """
    config = dict(metadata["config"])
    config["data"] = dict(config["data"]) | {
        "path": Path(config["data"]["path"] or "").name,
        "split_files": Path(config["data"].get("split_files") or "").name,
        "directory": "data",
    }
    if config.get("init", {}).get("workdir"):
        config["init"] = dict(config["init"]) | {"workdir": Path(config["init"]["workdir"]).name}
    return {k: v for k, v in metadata.items() if k == "versions"} | {
        "config": config,
        "statistics": dict(metadata["statistics"])
        | states
        | {"charges": list(CHARGES), "sizes": [MIN_ATOMS, states["sizes"][1]]},
    }


def records(workdir: Path) -> None:
    """Write the record numbers of the splits of a run, for data.held_out of another run."""
    data = RunData.load(workdir)
    record = np.asarray(data.store.index("record"))
    parts = {name: np.unique(record[rows]).tolist() for name, rows in data.parts.items()}
    write_json(workdir / "split_records.json", parts)


def errors(workdir: Path, force_field: str) -> None:
    """Print mean absolute errors on the test split in total, per size, element and charge."""
    potential, data = load_force_field(force_field), RunData.load(workdir)
    test = data.store.take(data.parts["test"])
    energy, forces = energies_and_forces(potential, test, np.arange(len(test)))
    energy_errors = 1e3 * np.abs(energy - test.energy) / test.n_atoms
    atom_errors = 1e3 * np.abs(forces - test.forces).mean(1)
    structure = np.repeat(np.arange(len(test)), test.n_atoms)
    print("| structures | molecules | conformations | energy meV/atom | force meV/Å |")
    print("|---|---|---|---|---|")

    def row(name, chosen):
        if not chosen.any():
            return
        count = len(np.unique(test.molecule[chosen].astype(str)))
        print(
            f"| {name} | {count} | {chosen.sum():,} | {energy_errors[chosen].mean():.1f} | "
            f"{atom_errors[chosen[structure]].mean():.0f} |"
        )

    everything = np.ones(len(test), bool)
    conformations = np.array(["relax" not in str(s) for s in test.subset])
    row("all", everything)
    row("conformations", conformations)
    row(f"conformations of {UNSEEN} random molecules", _unseen(test, conformations))
    row("snapshots of relaxations", ~conformations)
    for low, high in SIZES:
        row(f"{low} to {high - 1} atoms", (test.n_atoms >= low) & (test.n_atoms < high))
    for charge in np.unique(test.charge):
        row(f"charge {charge:+.0f}" if charge else "neutral", test.charge == charge)
    for z in np.unique(test.numbers):
        has = np.zeros(len(test), bool)
        has[structure[test.numbers == z]] = True
        own = atom_errors[test.numbers == z].mean()
        row(f"with {chemical_symbols[z]} (force on it: {own:.0f} meV/Å)", has)
    rms = np.sqrt(np.add.reduceat((test.forces**2).mean(1), test.offsets[:-1]) / test.n_atoms)
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 1.0), (1.0, np.inf)):
        span = f"{low:g} to {high:g} eV/Å" if high < np.inf else f"more than {low:g} eV/Å"
        row(f"RMS force {span}", (rms >= low) & (rms < high))
    slope = np.polyfit(test.n_atoms, 1e3 * (energy - test.energy), 1)[0]
    print(f"\nslope of the energy error with the number of atoms: {slope:+.1f} meV/atom")


def _unseen(test, among: np.ndarray) -> np.ndarray:
    names = np.unique(test.molecule[among].astype(str))
    chosen = np.random.default_rng(0).permutation(names)[:UNSEEN]
    return among & np.isin(test.molecule.astype(str), chosen)


def kinds(path: Path, force_field: str) -> None:
    """Print errors on a file of configs/generate.py by kind of geometries.

    Relative energies are those minus the mean over the geometries of the same molecule or pair;
    their errors do not contain the error of the composition.
    """
    with readers.open_data(str(path), "spice") as source:
        test = Columns.from_structures(source)
    potential = load_force_field(force_field)
    energy, forces = energies_and_forces(potential, test, np.arange(len(test)))
    error = 1e3 * (energy - test.energy)
    atom_errors = 1e3 * np.abs(forces - test.forces).mean(1)
    structure = np.repeat(np.arange(len(test)), test.n_atoms)
    subset = test.subset.astype(str)
    names, molecule = np.unique(np.char.add(subset, test.molecule.astype(str)), return_inverse=True)
    relative = error - (np.bincount(molecule, error) / np.bincount(molecule))[molecule]
    several = np.bincount(molecule)[molecule] > 1
    print("| kind | molecules | geometries | meV/atom | relative, meV | force meV/Å |")
    print("|---|---|---|---|---|---|")
    for kind in np.unique(subset):
        rows = subset == kind
        print(
            f"| {kind} | {len(np.unique(molecule[rows]))} | {rows.sum():,} | "
            f"{np.abs(error / test.n_atoms)[rows].mean():.1f} | "
            f"{np.abs(relative)[rows & several].mean():.0f} | "
            f"{atom_errors[rows[structure]].mean():.0f} |"
        )


def speed(seconds: float) -> None:
    """Print energies and forces of new geometries per second of processor time."""
    from tblite.ase import TBLite

    print("| molecule | atoms | mlip_jax, per CPU-second | GFN2-xTB, per CPU-second | ratio |")
    print("|---|---|---|---|---|")
    for name, smiles in MOLECULES.items():
        atoms, rates = from_smiles(smiles), []
        for calculator in (MLIPCalculator.pretrained(), TBLite(method="GFN2-xTB", verbosity=0)):
            atoms.calc, rng = calculator, np.random.default_rng(0)
            atoms.get_forces()  # compiles
            start, count, original = time.process_time(), 0, atoms.positions.copy()
            while time.process_time() - start < seconds or count < 2:
                atoms.positions = original + 0.01 * rng.normal(size=original.shape)
                atoms.get_forces()
                count += 1
            rates.append(count / (time.process_time() - start))
        ours, reference = rates
        print(f"| {name} | {len(atoms)} | {ours:.3g} | {reference:.3g} | {ours / reference:.0f} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "records", "errors", "kinds", "speed"))
    parser.add_argument(
        "path", type=Path, nargs="?", default=Path("runs/drugs"), help="workdir, or file of kinds"
    )
    parser.add_argument("--force_field", default=BUNDLED, help="for errors and kinds")
    parser.add_argument("--seconds", type=float, default=5.0, help="time per measurement")
    a = parser.parse_args()
    if a.what == "speed":
        speed(a.seconds)
    elif a.what in ("pack", "records"):
        {"pack": pack, "records": records}[a.what](a.path)
    else:
        {"errors": errors, "kinds": kinds}[a.what](a.path, a.force_field)


if __name__ == "__main__":
    main()
