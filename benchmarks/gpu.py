"""Speed on the device that is present, one page of results in about ten minutes.

    python benchmarks/gpu.py                                # needs the extra "data" for RDKit
    python benchmarks/gpu.py --peers=/envs/peers/bin/python # also SchNetPack and torch-sim there
    python benchmarks/gpu.py --out=page.md --seconds=20

The molecules are 60 drugs with 20 to 59 atoms (drugs.smi), embedded by RDKit. Training steps are
those of a run, with forces and Adam, of untrained models; every batch size is a separate
compilation, which is not part of the rate. Relaxations and dynamics are those of the force field
of the package. On a GPU, rows "fused kernels" are PaiNN with its Pallas kernels
(MLIP_JAX_FUSED_KERNELS), whose forces are compared with the usual ones. A row ends with what
failed, such as the memory of the device, and the next follows.

SchNetPack trains its PaiNN of the same size on the same molecules in the same batches. torch-sim
relaxes the same molecules with an untrained PaiNN of SchNetPack, so only the rates of steps can be
compared: compare "molecule steps/s", not "molecules/s".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from ase import Atoms

from benchmarks.machine import describe
from mlip_jax import MolecularDynamics, models, relax
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.smiles.embedding import EmbeddingOptions, embed_entry
from mlip_jax.datasets.smiles.entries import Entry
from mlip_jax.defaults import train_defaults
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.neighbor_slots import add_neighbor_slots, choose_capacity
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.importers import load_force_field
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.structure import Structure
from mlip_jax.target_device import fused_kernels, target_platform
from mlip_jax.training import optimizer
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.step import Trainer

DRUGS = Path(__file__).with_name("drugs.smi")
PACKAGES = ("mlip-flax", "jax", "jaxlib", "flax")
OPTIONS = {
    "painn": dict(num_features=128, num_layers=3, num_radial=20),
    "so3krates": dict(num_features=132, num_layers=3, num_heads=4, num_radial=32),
}
LOSS = {"penalty": "mse", "energy_per_atom": False}
FORCE_WEIGHT = 0.99
MD = {"ensemble": "langevin", "timestep": 0.5, "temperature": 300.0}  # fs, K
SHAKE = 0.02  # Å, standard deviation of the displacements that make copies of a molecule different


def drugs(count: int) -> list[Atoms]:
    """Return `count` drugs with coordinates of RDKit."""
    found = []
    for number, line in enumerate(DRUGS.read_text().splitlines()[:count]):
        smiles = line.split()[0]
        entry = Entry(number, "", smiles, smiles)
        found += [r.atoms for r in embed_entry((entry, EmbeddingOptions(1, True, 0)))[:1]]
    return found


def copies(molecules: Sequence[Atoms], count: int, seed: int = 0) -> list[Atoms]:
    """Return `count` displaced copies of molecules in turn."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        atoms = molecules[number % len(molecules)].copy()
        atoms.positions += rng.normal(0, SHAKE, atoms.positions.shape)
        found.append(atoms)
    return found


def columns_of(molecules: Sequence[Atoms]) -> Columns:
    """Return molecules as training data; labels do not change the speed."""
    return Columns.from_structures(
        [
            Structure(
                numbers=a.numbers, positions=a.positions, energy=0.0, forces=np.zeros((len(a), 3))
            )
            for a in molecules
        ]
    )


def training(name: str, molecules: Sequence[Atoms], batch: int, seconds: float) -> dict[str, float]:
    """Time training steps on one batch that stays on the device."""
    model = models.create(name, zero_init=False, **OPTIONS[name])
    columns = columns_of(copies(molecules, batch))
    sizes = graph_sizes(columns, model.cutoff)
    graph = build_batch(columns, choose_budget(sizes, batch), model.cutoff)
    real = graph.receivers[: int(sizes.n_edge.sum())]
    counts = np.bincount(real)
    capacity = choose_capacity(model, int(counts.max()), float(counts.mean()))
    config = train_defaults().optimizer
    config.name = "adam"
    trainer = Trainer(
        ForceField(model, 1.0, lambda step: FORCE_WEIGHT, FORCE_WEIGHT, LOSS),
        optimizer.create(config, 10_000, 100.0),
        0.999,
        build=lambda data, graph, bucket: add_neighbor_slots(graph, capacity),
    )
    state = trainer.init(jax.jit(model.init)(jax.random.key(0), example_graph()))
    inputs = trainer.replicate(jax.tree.map(lambda x: np.asarray(x)[None, None], graph))
    begin = time.perf_counter()
    state, _ = trainer.train(state, inputs)
    jax.block_until_ready(state)
    compiled, steps = time.perf_counter() - begin, 0
    begin = time.perf_counter()
    while not steps or time.perf_counter() - begin < seconds:
        for _ in range(10):  # queued on the device
            state, _ = trainer.train(state, inputs)
        jax.block_until_ready(state)
        steps += 10
    elapsed = time.perf_counter() - begin
    devices = trainer.num_devices
    return {
        "structures/s": steps * batch * devices / elapsed,
        "ms/step": 1e3 * elapsed / steps,
        "compile s": compiled,
    }


def relaxation(force_field, molecules: Sequence[Atoms], count: int) -> dict[str, float]:
    """Time a batched relaxation, after one that compiles."""
    begin = time.perf_counter()
    relax(copies(molecules, count, seed=1), force_field)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    results = relax(copies(molecules, count, seed=2), force_field)
    elapsed = time.perf_counter() - begin
    steps = sum(result.steps for result in results)
    return {
        "molecules/s": count / elapsed,
        "molecule steps/s": steps / elapsed,
        "compile s": max(first - elapsed, 0.0),
    }


def dynamics(force_field, atoms: Atoms, replicas: int, seconds: float) -> dict[str, float]:
    """Time dynamics of replicas of a molecule."""
    md = MolecularDynamics([atoms], force_field, replicas=replicas, **MD)
    begin = time.perf_counter()
    md.run(10)
    compiled, first = time.perf_counter() - begin, md.step
    begin = time.perf_counter()
    while md.step == first or time.perf_counter() - begin < seconds:
        before = md.step
        md.run(100)
        if md.step == before or md.broken:
            raise RuntimeError(f"{len(md.broken)} molecule(s) broke after {md.step} steps")
    elapsed, done = time.perf_counter() - begin, md.step - first
    return {
        "steps/s": done / elapsed,
        "ms/step": 1e3 * elapsed / done,
        "molecule steps/s": done * replicas / elapsed,
        "compile s": compiled,
    }


def with_fused_kernels(measure: Callable):
    """Return a measurement of programs that are traced with the Pallas kernels of PaiNN."""
    jax.clear_caches()
    with fused_kernels(True):
        found = measure()
    jax.clear_caches()
    return found


def fused_rows(molecules, batches, seconds) -> Iterator[tuple[str, Callable]]:
    """Yield name and measurement of the rows of PaiNN with Pallas kernels."""
    yield "fused kernels: forces of painn", lambda: fused_error(molecules)
    for batch in batches:
        name = f"fused kernels: training painn, batch {batch}"
        yield (
            name,
            lambda b=batch: with_fused_kernels(lambda: training("painn", molecules, b, seconds)),
        )


def fused_error(molecules: Sequence[Atoms]) -> dict[str, float]:
    """Compare forces with and without the kernels, of an untrained model and a batch."""
    model = models.create("painn", zero_init=False, **OPTIONS["painn"])
    columns = columns_of(copies(molecules, 16))
    sizes = graph_sizes(columns, model.cutoff)
    graph = build_batch(columns, choose_budget(sizes, 16), model.cutoff)
    capacity = int(np.bincount(graph.receivers[: int(sizes.n_edge.sum())]).max())
    params = jax.jit(model.init)(jax.random.key(0), example_graph())

    def forces(params, graph):
        return evaluate(model, params, add_neighbor_slots(graph, capacity), 1.0).forces

    plain = np.asarray(jax.jit(forces)(params, graph))
    fused = with_fused_kernels(lambda: np.asarray(jax.jit(forces)(params, graph)))
    return {
        "largest error / largest force": float(np.abs(fused - plain).max() / np.abs(plain).max())
    }


def write_work(path: Path, molecules: Sequence[Atoms]) -> None:
    """Write the molecules in the format of benchmarks/peers/measure.py."""
    lengths = [len(atoms) for atoms in molecules]
    positions = np.concatenate([atoms.positions for atoms in molecules])
    np.savez(
        path,
        numbers=np.concatenate([atoms.numbers for atoms in molecules]),
        positions=positions,
        forces=np.zeros_like(positions),
        energy=np.zeros(len(molecules)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )


def peer(python: str, driver: str, job: dict) -> dict:
    """Run a driver of benchmarks/peers in another environment and return its result."""
    command = [python, str(ROOT / "benchmarks" / "peers" / driver), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_rows(python, molecules, batches, count, seconds) -> Iterator[tuple[str, Callable]]:
    """Yield name and measurement of the rows of SchNetPack and torch-sim."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.npz"
        write_work(path, copies(molecules, max(*batches, count)))
        job = {
            "model": "painn",
            "options": OPTIONS["painn"],
            "work": str(path),
            "batches": 1,
            "seconds": seconds,
            "counters": False,
        }

        def train(batch):
            found = peer(python, "run_schnetpack.py", job | {"part": "train", "batch": batch})
            return {
                "structures/s": found["structures_per_s"],
                "ms/step": found["step_ms"]["median"],
                "compile s": found["compile_s"],
            }

        for batch in batches:
            yield f"SchNetPack: training painn, batch {batch}", lambda b=batch: train(b)

        def relaxed():
            weights = {"weights": str(Path(folder) / "painn.npz"), "batch": min(batches)}
            peer(python, "run_relax_schnetpack.py", job | weights | {"part": "weights"})
            options = weights | {"part": "batched", "batch": count, "atoms": 16_384}
            found = peer(python, "run_torchsim.py", job | options | {"method": "bfgs"})
            return {
                "molecules/s": found["molecules_per_s"],
                "molecule steps/s": found["molecule_steps"] / found["seconds"],
            }

        yield f"torch-sim: {count} relaxations, untrained painn", relaxed


def row(name: str, measure: Callable[[], dict[str, float]]) -> str:
    """Return a line of the page: the values of a measurement, or why there are none."""
    try:
        values = measure()
    except Exception as error:  # such as the memory of the device; the next row may succeed
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"| {name} | failed: {reason[:160]} |"
    return f"| {name} | {', '.join(f'{v:,.4g} {unit}' for unit, v in values.items())} |"


def main(argv: list[str] | None = None) -> int:
    """Measure and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="painn,so3krates", help="models to train")
    parser.add_argument("--batches", default="64,256,1024", help="structures per training step")
    parser.add_argument("--relaxations", type=int, default=2000, help="molecules to relax; 0: none")
    parser.add_argument("--replicas", default="1,32,256", help="replicas in dynamics; empty: none")
    parser.add_argument("--molecules", type=int, default=60, help="number of different drugs")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of a measurement")
    parser.add_argument("--force_field", default=BUNDLED, help="for relaxations and dynamics")
    parser.add_argument("--peers", help="Python with SchNetPack and torch-sim, with CUDA")
    parser.add_argument("--out", type=Path, help="file for the page, Markdown")
    options = parser.parse_args(argv)
    batches = [int(x) for x in options.batches.split(",") if x]
    replicas = [int(x) for x in options.replicas.split(",") if x]
    molecules, seconds = drugs(options.molecules), options.seconds
    device = jax.devices()[0]
    lines = [
        f"# {device.device_kind} ({device.platform}, {jax.device_count()} device(s))",
        "",
        f"{describe(PACKAGES)}. Command: `python benchmarks/gpu.py {' '.join(argv or sys.argv[1:])}`",
        "",
        "| measurement | result |",
        "|---|---|",
    ]
    print("\n".join(lines), flush=True)
    rows: list[tuple[str, Callable]] = []
    for name in options.models.split(","):
        for batch in batches:
            rows.append(
                (
                    f"training {name}, batch {batch}",
                    lambda n=name, b=batch: training(n, molecules, b, seconds),
                )
            )
    if target_platform() == "gpu" and "painn" in options.models.split(","):
        rows += fused_rows(molecules, batches, seconds)
    field = load_force_field(options.force_field) if options.relaxations or replicas else None
    if count := options.relaxations:
        rows.append((f"{count} relaxations", lambda: relaxation(field, molecules, count)))
    largest = max(molecules, key=len)
    for number in replicas:
        rows.append(
            (
                f"dynamics of {number} x {len(largest)} atoms",
                lambda n=number: dynamics(field, largest, n, seconds),
            )
        )
    if options.peers:
        rows += peer_rows(options.peers, molecules, batches, max(count, 1), seconds)
    for name, measure in rows:
        lines.append(row(name, measure))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
