"""Speed and memory of the data pipeline: conversion, neighbor lists, batches.

    taskset -c 0 python benchmarks/data.py convert    # HDF5 in SPICE's layout -> store, on one core
    taskset -c 0 python benchmarks/data.py neighbors  # 40 atoms; with vesin, matscipy and NumPy
    python benchmarks/data.py input                   # batches of a store, with and without a model
    python benchmarks/data.py memory                  # conversion and training, 20 million atoms
    taskset -c 0 python benchmarks/data.py compare --old CHECKOUT --data spice=A.hdf5 pubchemqcr=B.lmdb

The molecules are random clusters of H, C, N and O with distances of at least 1.1 Å, denser than
drug-like molecules, in SPICE's layout with 50 conformations each. The speed of reading, checks and
neighbor lists does not depend on the chemistry. vesin and matscipy are measured if installed.

`compare` converts the first structures of data files with another checkout of mlip_jax and with this
one in turn, each in a new process. The time is the CPU time of the conversion and of all its
processes, without the imports of the first. With --in_worker it is that of a worker process which has
started, as for most records of a large data set.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import describe, spread
from mlip_jax.cli.process import ALLOCATOR
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store
from mlip_jax.graphs.neighbors import neighbor_list

CUTOFF = 5.0
SPRING = 2.4  # hartree/Å²; as stiff as real bonds, which the checks of the data require
PACKAGES = ("numpy", "h5py", "grain", "jax", "vesin", "matscipy", "ase")


# Program of `compare`: checkout, reader, path, number of records, folder -> structures, seconds.
CONVERSION = """
import contextlib, ctypes, glob, os, signal, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: children of workers become children
checkout, reader, path, records, folder = sys.argv[1:]
sys.path.insert(0, checkout)
from mlip_jax.datasets.readers import open_data
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.shard_conversion import ShardJob, convert_shard
assert sys.modules["mlip_jax"].__file__.startswith(checkout)
seconds = lambda: sum(os.times()[:4])
spec, start = ConversionSpec(path, reader), seconds()
in_worker, records = records.startswith("worker"), records.removeprefix("worker")
if in_worker:
    from mlip_jax import workers
    getattr(workers, "set_isolated", lambda: None)()
if records == "all":
    convert(spec, folder, num_processes=1, reject_invalid=False, progress=False)
else:
    os.makedirs(folder + "/shards")
    with open_data(path, reader) as source:
        target = __import__("pathlib").Path(folder)
        if in_worker:  # the imports of a worker do not count
            convert_shard(ShardJob(spec, target, 0, 0, 2), source)
            os.remove(folder + "/shards/00000.json")
            start = seconds()
        convert_shard(ShardJob(spec, target, 1, 0, min(int(records), len(source))), source)
for path in glob.glob("/proc/[0-9]*/stat"):
    with contextlib.suppress(OSError):  # other processes end
        pid, _, rest = open(path).read().partition(" (")
        if int(rest.rpartition(")")[2].split()[1]) == os.getpid():
            os.kill(int(pid), signal.SIGKILL)
try:  # the times of children count when they have ended
    while True:
        os.wait()
except ChildProcessError:
    used = seconds() - start
import json, pathlib
shards = [json.loads(p.read_text()) for p in pathlib.Path(folder, "shards").glob("*.json")]
print(sum(s["totals"]["structures"] for s in shards), used)
"""


def molecule(rng: np.random.Generator, n_atoms: int) -> np.ndarray:
    """Return positions (n_atoms, 3) in Å of a compact random cluster with distances above 1.1 Å."""
    placed = [np.zeros(3)]
    while len(placed) < n_atoms:
        direction = rng.normal(size=3)
        candidate = placed[rng.integers(len(placed))] + 1.35 * direction / np.linalg.norm(direction)
        if min(np.linalg.norm(candidate - p) for p in placed) > 1.1:
            placed.append(candidate)
    return np.array(placed)


def write_spice(
    path: Path, num_molecules: int, conformations: int = 50, n_atoms: int = 40, seed: int = 0
) -> int:
    """Write a file in SPICE's layout with harmonic energies; return the number of structures."""
    rng = np.random.default_rng(seed)
    templates = [molecule(rng, n_atoms) for _ in range(20)]
    with h5py.File(path, "w") as file:
        for m in range(num_molecules):
            rest = templates[m % len(templates)]
            numbers = rng.permutation(
                np.r_[np.full(n_atoms // 2, 1), rng.choice([6, 7, 8], n_atoms - n_atoms // 2)]
            )
            moves = rng.normal(0, 0.05, (conformations, n_atoms, 3))
            moves -= moves.mean(1, keepdims=True)
            group = file.create_group(f"molecule-{m}")
            for name, data, unit in (
                ("atomic_numbers", numbers.astype(np.int16), None),
                ("conformations", ((rest + moves) / 0.529177210903).astype(np.float32), "bohr"),
                (
                    "dft_total_energy",
                    -40.0 * n_atoms + 0.5 * SPRING * (moves**2).sum((1, 2)),
                    "hartree",
                ),
                (
                    "dft_total_gradient",
                    (SPRING * moves * 0.529177210903).astype(np.float32),
                    "hartree/bohr",
                ),
                ("formation_energy", np.full(conformations, -5.0), "hartree"),
            ):
                dataset = group.create_dataset(name, data=data)
                if unit:
                    dataset.attrs["units"] = unit
            text = h5py.string_dtype()
            group.create_dataset("smiles", data=[f"[{m + 1}C:1]"], dtype=text)
            group.create_dataset("subset", data=["artificial"], dtype=text)
    return num_molecules * conformations


def run_convert(folder: Path, repeats: int) -> None:
    path = folder / "spice.hdf5"
    count = write_spice(path, 400)
    rates = []
    for i in range(repeats):
        start = time.process_time()
        convert(ConversionSpec(str(path)), folder / f"store-{i}", num_processes=1, progress=False)
        rates.append(count / (time.process_time() - start))
    print(
        f"conversion of {count} structures of 40 atoms, 50 per molecule, with checks: "
        f"{spread(rates)} structures/core-s"
    )


def run_compare(
    folder: Path, repeats: int, old: Path, data: list[str], records: int, in_worker: bool
) -> None:
    """Compare the rates of conversion of another checkout with those of this one."""
    checkouts = {"old": old.absolute(), "new": Path(__file__).absolute().parents[1]}
    for reader, _, path in (each.partition("=") for each in data):
        count, file = f"{'worker' * in_worker}{records}", Path(path).absolute()
        if file.suffix == ".hdf5" and not in_worker:
            # convert all of a smaller file, so that workers count
            count, file = "all", _first_groups(file, folder / file.name, records)
        rates = {name: [] for name in checkouts}
        for k in range(repeats):
            for name, checkout in checkouts.items():
                store = folder / f"{reader}-{name}-{k}"
                command = [sys.executable, "-P", "-c", CONVERSION, str(checkout), reader]
                run = subprocess.run([*command, str(file), count, str(store)], capture_output=True)
                if run.returncode:
                    sys.exit(run.stderr.decode())
                structures, seconds = run.stdout.split()
                rates[name].append(int(structures) / float(seconds))
        ratio = np.median(rates["new"]) / np.median(rates["old"])
        print(
            f"{reader}, {int(structures)} structures: old {spread(rates['old'])}, new "
            f"{spread(rates['new'])} structures/CPU-s; ratio of medians {ratio:.2f}",
            flush=True,
        )


def _first_groups(path: Path, target: Path, count: int) -> Path:
    """Copy the first `count` groups of an HDF5 file."""
    with h5py.File(path) as source, h5py.File(target, "w") as file:
        file.attrs.update(source.attrs)
        for name in list(source)[:count]:
            source.copy(name, file)
    return target


def run_neighbors(folder: Path, repeats: int) -> None:
    rng = np.random.default_rng(0)
    molecules = [molecule(rng, 40) for _ in range(300)]
    methods = {
        "mlip_jax": lambda p: neighbor_list(p, CUTOFF),
        "NumPy brute force": _brute_force,
        **_peers(),
    }
    for method in methods.values():
        method(molecules[0])
    rates = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.process_time()
            for positions in molecules:
                method(positions)
            rates[name].append(len(molecules) / (time.process_time() - start))
    edges = np.mean([len(neighbor_list(p, CUTOFF).senders) for p in molecules])
    print(
        f"neighbor lists, 40 atoms, {CUTOFF} Å, {edges:.0f} directed edges "
        "(mlip_jax: sorted, with pair order):"
    )
    for name in methods:
        print(f"  {name}: {spread(rates[name])} structures/core-s")


def _brute_force(positions):
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return np.nonzero(distances < CUTOFF)


def _peers():
    peers = {}
    try:
        from vesin import NeighborList

        calculator, box = NeighborList(cutoff=CUTOFF, full_list=True), np.zeros((3, 3))
        peers["vesin"] = lambda p: calculator.compute(
            points=p, box=box, periodic=False, quantities="ij"
        )
    except ImportError:
        pass
    try:
        from matscipy.neighbours import neighbour_list

        cell = 100 * np.eye(3)
        peers["matscipy"] = lambda p: neighbour_list(
            "ij", positions=p, cell=cell, pbc=[False] * 3, cutoff=CUTOFF
        )
    except ImportError:
        pass
    return peers


def run_input(folder: Path, repeats: int) -> None:
    write_spice(folder / "spice.hdf5", 200)
    store = Store(
        convert(ConversionSpec(str(folder / "spice.hdf5")), folder / "store", progress=False)
    )
    for batch_size in (8, 32):
        batches, split = _batches(store, batch_size)
        for name, step in (("without steps", None), ("during device steps of 5 ms", 0.005)):
            rates, waits = zip(*(_pull(batches, split, step, 600) for _ in range(repeats)))
            wait = (
                ""
                if step is None
                else f", waiting for input {spread([100 * w for w in waits])} % of the time"
            )
            print(
                f"input, {batch_size} structures of 40 atoms, {name}: "
                f"{spread(rates)} batches/s{wait}"
            )
        if batch_size == 8:
            _with_model(batches, split, repeats)


def _batches(store, batch_size):
    from mlip_jax.graphs.edge_counts import edge_counts
    from mlip_jax.graphs.padding import choose_budget
    from mlip_jax.graphs.shapes import Sizes
    from mlip_jax.training.data import Batches, Split

    split = Split(
        store, np.arange(len(store)), Sizes(store.index("n_atoms"), edge_counts(store, CUTOFF))
    )
    return Batches((choose_budget(split.sizes, batch_size),), CUTOFF, np.zeros(119), 1), split


def _pull(batches, split, step, count):
    """Return batches per second and the fraction of time waiting for them.

    A step of `step` seconds is simulated by sleeping.
    """
    stream = batches.training(split, seed=0)
    for _ in range(20):
        next(stream)
    waited, start = 0.0, time.perf_counter()
    for _ in range(count):
        requested = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - requested
        if step:
            time.sleep(step)
    elapsed = time.perf_counter() - start
    stream.close()
    return count / elapsed, waited / elapsed


def _with_model(batches, split, repeats):
    import jax
    import optax

    from mlip_jax import models
    from mlip_jax.configs.spice import get_config
    from mlip_jax.potential import example_graph
    from mlip_jax.training.objectives import ForceField
    from mlip_jax.training.step import Trainer

    options = get_config().model.options.to_dict()
    model = models.create("so3krates", **options)
    loss = {"penalty": "mae", "energy_per_atom": False, "huber_delta": 0.05}
    trainer = Trainer(ForceField(model, 1.0, lambda step: 0.9, 0.9, loss), optax.adam(1e-3), 0.999)
    state = trainer.init(jax.jit(model.init)(jax.random.key(0), example_graph()))
    stream = batches.training(split, seed=0)
    _, kept = next(stream)
    state, sums = trainer.train(state, kept)
    rates = {"the same batch in every step": [], "batches from the store": []}
    for _ in range(repeats):
        for name in rates:
            start = time.perf_counter()
            for _ in range(30):
                graphs = kept if name.startswith("the same") else next(stream)[1]
                state, sums = trainer.train(state, graphs)
            jax.block_until_ready(sums)
            rates[name].append(30 / (time.perf_counter() - start))
    stream.close()
    for name, values in rates.items():
        print(
            f"training of So3krates on this CPU, 8 structures of 40 atoms, {name}: "
            f"{spread(values)} batches/s"
        )


def run_memory(folder: Path, atoms: int) -> None:
    for size in (atoms // 50, atoms):
        inside = folder / str(size)
        inside.mkdir()
        _memory_of(inside, size)


def _memory_of(folder: Path, atoms: int) -> None:
    """Measure the memory for a store with `atoms` atoms and a small model."""
    path = folder / "spice.hdf5"
    count = write_spice(path, atoms // (40 * 50))
    print(
        f"{count} structures, {40 * count / 1e6:.1f} million atoms, "
        f"{path.stat().st_size / 2**20:.0f} MiB of HDF5"
    )
    store = folder / "store"
    model = ["num_features=24", "num_layers=1"]
    script = [sys.executable, __file__]
    train = [
        *script,
        "child",
        "--config=configs/spice.py:painn",
        f"--config.data.path={store}",
        "--config.train.num_steps=1000",
        "--config.train.valid_every=500",
        f"--config.data.num_train={count}",
        "--config.data.num_valid=1000",
        "--config.data.num_test=1000",
        *(f"--config.model.options.{m}" for m in model),
    ]
    for task, command, tunables in (
        (
            "convert",
            [
                *script,
                "child",
                "--config=configs/convert.py",
                f"--config.data.path={path}",
                f"--workdir={store}",
            ],
            ALLOCATOR,
        ),
        ("input only, 2,000 batches", [*script, "pull", str(store)], ALLOCATOR),
        ("train", [*train, f"--workdir={folder / 'tuned'}"], ALLOCATOR),
        ("train, default allocator", [*train, f"--workdir={folder / 'plain'}"], ""),
    ):
        start = time.perf_counter()
        with open(folder / "log", "w") as log:
            run = subprocess.run(
                command, stdout=log, stderr=log, env=os.environ | {"GLIBC_TUNABLES": tunables}
            )
        lines = (folder / "log").read_text().splitlines()
        if run.returncode:
            sys.exit("\n".join(lines[-30:]))
        print(f"{task}: {time.perf_counter() - start:.0f} s, {lines[-1]}", flush=True)


def child(arguments: list[str]) -> None:
    """Run the main program, and report its peak memory and that of its largest worker process."""
    from mlip_jax import main

    sys.argv = ["main", *arguments]
    try:
        main.main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        _report_memory()


def pull(store: str) -> None:
    """Read batches from a store, without a model and without compilation."""
    batches, split = _batches(Store(store), 8)
    _pull(batches, split, None, 2000)
    _report_memory()


def _report_memory() -> None:
    process, worker = (
        resource.getrusage(kind).ru_maxrss / 2**10
        for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"peak memory {process:.0f} MiB, largest worker {worker:.0f} MiB", file=sys.stderr)


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        return child(sys.argv[2:])
    if sys.argv[1:2] == ["pull"]:
        return pull(sys.argv[2])
    if "GLIBC_TUNABLES" not in os.environ:  # as in the main program; glibc reads it at the start
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("convert", "neighbors", "input", "memory", "compare"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--atoms", type=int, default=20_000_000, help="number of atoms in the store of `memory`"
    )
    parser.add_argument("--folder", type=Path, help="folder of the files; default: temporary")
    parser.add_argument("--old", type=Path, help="another checkout, for `compare`")
    parser.add_argument("--data", nargs="+", default=[], help="READER=PATH, for `compare`")
    parser.add_argument("--records", type=int, default=1000, help="records of each, for `compare`")
    parser.add_argument(
        "--in_worker", action="store_true", help="time of a worker without its start, for `compare`"
    )
    arguments = parser.parse_args()
    print(describe(PACKAGES))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.part == "memory":
            run_memory(Path(folder), arguments.atoms)
        elif arguments.part == "compare":
            run_compare(
                Path(folder),
                arguments.repeats,
                arguments.old,
                arguments.data,
                arguments.records,
                arguments.in_worker,
            )
        else:
            {"convert": run_convert, "neighbors": run_neighbors, "input": run_input}[
                arguments.part
            ](Path(folder), arguments.repeats)


if __name__ == "__main__":
    main()
