"""Add off-equilibrium geometries to relaxation trajectories, in PubChemQCR's layout.

    python benchmarks/off_equilibrium.py TRAJECTORIES.lmdb MORE.lmdb --frames=8
    python -m mlip_jax.main --config=configs/pubchemqcr.py:small --config.data.path=MORE.lmdb \
        --workdir=runs/more \
        --config.data.reader_options="stages=('DFT_1st','DFT_2nd'); level_of_theory=GFN2-xTB"

Snapshots of a relaxation are close to the path to the minimum. A force field that is trained only
on them is inaccurate elsewhere. Each molecule gets `frames` geometries in the stage DFT_2nd,
labeled with GFN2-xTB: random snapshots of one of --stages with two kinds of noise. White noise (up
to --white) changes bonds and angles; noise that is correlated over 1.5 to 3 Å (up to --smooth)
changes angles and torsions. With --white=0.03 --smooth=0, the forces contain the Hessian along
random directions. The molecules are those of the trajectories, so a split by molecule is valid for
both. Geometries with a force above --max_force are omitted.
"""

import argparse
import gzip
import pickle
import sys
from pathlib import Path

import lmdb
import numpy as np
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlip_jax import workers
from mlip_jax.datasets import readers
from mlip_jax.datasets.builtin.labels import NotConverged, energy_and_gradient
from mlip_jax.datasets.formats import safe_pickle

SEED = 0


def perturb(
    positions: np.ndarray, noise: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Displace positions (n, 3) in Å; `noise` is the maximum of white and of smooth noise in Å."""
    white = rng.uniform(0.0, noise[0]) * rng.normal(size=positions.shape)
    length, size = rng.uniform(1.5, 3.0), rng.uniform(0.0, noise[1])
    squared = ((positions[:, None] - positions[None]) ** 2).sum(-1)
    root = np.linalg.cholesky(np.exp(-squared / (2 * length**2)) + 1e-6 * np.eye(len(positions)))
    return positions + white + size * root @ rng.normal(size=positions.shape)


def snapshot(numbers, positions, energy, gradient) -> dict:
    """Return a snapshot in the layout of the files, in Å, hartree and hartree/bohr."""
    atoms = [{"atom": chemical_symbols[z], "charge": float(z)} for z in numbers]
    return {
        "coordinates": [a | dict(zip("xyz", map(float, x))) for a, x in zip(atoms, positions)],
        "energy": float(energy),
        "gradient": [
            a | dict(zip(("dx", "dy", "dz"), map(float, g))) for a, g in zip(atoms, gradient)
        ],
    }


def frames_of(job):
    """Return (key, off-equilibrium snapshots) of one molecule."""
    key, numbers, trajectories, count, noise, max_force = job
    rng = np.random.default_rng([SEED, key])
    snapshots = []
    for _ in range(count):
        trajectory = trajectories[rng.integers(len(trajectories))]
        positions = perturb(trajectory[rng.integers(len(trajectory))], noise, rng)
        try:
            energy, gradient = energy_and_gradient(numbers, positions / Bohr)
        except NotConverged:
            continue
        if np.linalg.norm(gradient, axis=1).max() * Hartree / Bohr < max_force:
            snapshots.append(snapshot(numbers, positions, energy, gradient))
    return key, snapshots


def trajectories_of(path, stages):
    """Return {CID: (numbers, one list of positions per stage with snapshots)}."""
    trajectories = {}
    for stage in stages:
        with readers.open_data(
            path, "pubchemqcr", stages=(stage,), level_of_theory="GFN2-xTB"
        ) as source:
            of_stage = {}
            for s in source:
                # several compounds may be one molecule without stereochemistry
                cid = int(s.source.rpartition(":")[2])
                of_stage.setdefault(cid, (s.numbers, []))[1].append(s.positions)
        for key, (numbers, frames) in of_stage.items():
            trajectories.setdefault(key, (numbers, []))[1].append(frames)
    return trajectories


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trajectories", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--frames", type=int, default=8, help="geometries per molecule")
    parser.add_argument(
        "--stages", default="pm3,DFT_1st", help="stages of the snapshots, with equal probability"
    )
    parser.add_argument("--white", type=float, default=0.08, help="maximum white noise, Å")
    parser.add_argument("--smooth", type=float, default=0.25, help="maximum smooth noise, Å")
    parser.add_argument(
        "--keep_every",
        type=int,
        default=1,
        help="keep every n-th snapshot of DFT_1st and the last one, because they are similar",
    )
    parser.add_argument("--max_force", type=float, default=15.0, help="largest force, eV/Å")
    parser.add_argument("--num_processes", type=int, default=None)
    a = parser.parse_args()
    if a.output.exists():
        sys.exit(f"{a.output}: exists already. Choose another name.")
    from rich.progress import track

    jobs = [
        (key, numbers, trajectories, a.frames, (a.white, a.smooth), a.max_force)
        for key, (numbers, trajectories) in trajectories_of(
            a.trajectories, a.stages.split(",")
        ).items()
    ]
    labeled = {
        key: frames
        for _, (key, frames) in track(
            workers.run(frames_of, jobs, a.num_processes), "computing labels", total=len(jobs)
        )
    }
    old = lmdb.open(str(a.trajectories), subdir=False, readonly=True, lock=False)
    new = lmdb.open(str(a.output), subdir=False, map_size=1 << 34)
    kept = total = 0
    with old.begin() as source, new.begin(write=True) as target:
        for key, value in source.cursor():
            frames = labeled.get(int(key)) if key.isdigit() else None
            if frames:
                value = gzip.compress(_with_stage(value, frames, a.keep_every), 3)
                kept, total = kept + 1, total + len(frames)
            target.put(key, value)
    new.close()
    summary = a.trajectories.with_name("summary.csv")
    if summary.exists():
        (a.output.parent / "summary.csv").write_bytes(summary.read_bytes())
    print(f"{total} geometries of {kept} molecules")


def _with_stage(value: bytes, frames: list, keep_every: int) -> bytes:
    record = safe_pickle.loads(gzip.decompress(value), allowed={}, source="a record")
    relaxation = record["DFT_1st"] or []
    kept = relaxation[:-1:keep_every] + relaxation[-1:]
    return pickle.dumps(record | {"DFT_1st": kept, "DFT_2nd": frames})


if __name__ == "__main__":
    main()
