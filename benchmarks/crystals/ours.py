"""Relax crystals and optimize reaction paths with mlip_jax, for comparison with original.py.

    taskset -c 0 python ours.py relax FORCE_FIELD FOLDER/crystals.json RESULTS.jsonl
    taskset -c 0 python ours.py neb sevennet-0 FOLDER/reactions.json RESULTS.jsonl --program=sevennet

Structures are relaxed twice in batches: the second time no program is compiled. Each line has a
structure or a path; the last one has the processor times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks.crystals.original import FMAX, MAX_STEPS, NEB_FMAX, NUM_IMAGES, named, read, write
from mlip_jax import Relaxer
from mlip_jax.simulation.force_fields import load_mean_force_field
from mlip_jax.simulation.reactions.neb import neb


def relax(structures, force_field, rounds, ends, **options) -> tuple[list[dict], dict]:
    """Relax all structures; return a line for each, and one with the processor times.

    Args:
      structures: The structures; `info` has their kinds.
      force_field: The force field.
      rounds: Number of times that everything is relaxed.
      ends: New file for the relaxed structures, or None.
      options: Options of `Relaxer`.
    """
    relaxers = {cell: Relaxer(force_field, cell=cell, **options) for cell in ("frechet", None)}
    seconds, results = [], {}
    for _ in range(rounds):
        seconds.append([])
        for cell, relaxer in relaxers.items():
            begin = time.process_time()
            chosen = {
                k: atoms
                for k, atoms in enumerate(structures)
                if (atoms.info["kind"] != "surface") == bool(cell)
            }
            results |= dict(relaxer.stream(chosen.items()))
            seconds[-1].append(time.process_time() - begin)
    lines = []
    for k, atoms in enumerate(structures):
        result = results[k]
        lines.append(
            {
                "name": atoms.info["name"],
                "kind": atoms.info["kind"],
                "atoms": len(atoms),
                "energy": float(result.energy),
                "volume": float(result.atoms.get_volume()) if atoms.pbc.all() else None,
                "steps": result.steps,
                "converged": result.converged,
                "status": f"{result.status} {result.reason}".strip(),
            }
        )
    if ends:
        relaxed = [results[k].atoms for k in range(len(structures))]
        for atoms, start in zip(relaxed, structures):
            atoms.info |= {name: start.info[name] for name in ("name", "kind")}
        write(ends, relaxed)
    counters = [relaxer.statistics() for relaxer in relaxers.values()]
    return lines, {
        "name": "all",
        "cpu_s": sum(seconds[-1]),
        "first_cpu_s": sum(seconds[0]),
        "cpu_s_cells_and_surfaces": seconds[-1],
        "structures": len(structures),
        "statistics": counters,
    }


def paths(structures, force_field) -> tuple[list[dict], dict]:
    """Optimize paths; return a line for each, and one with the processor time."""
    given = [structures[k : k + 2] for k in range(0, len(structures), 2)]
    begin = time.process_time()
    found = neb(given, force_field, num_images=NUM_IMAGES, fmax=NEB_FMAX, max_steps=MAX_STEPS)
    seconds = time.process_time() - begin
    lines = [
        {
            "name": ends[0].info["name"],
            "atoms": len(ends[0]),
            "barrier": path.barrier,
            "reaction_energy": path.reaction_energy,
            "steps": path.steps,
            "converged": path.converged,
            "status": f"{path.status} {path.reason}".strip(),
        }
        for ends, path in zip(given, found)
    ]
    return lines, {"name": "all", "first_cpu_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("relax", "neb"))
    parser.add_argument("force_field")
    parser.add_argument("structures", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--program", help="optimize only the paths of this program")
    parser.add_argument("--batch_atoms", type=int)
    parser.add_argument("--kind", help="relax only structures of this kind")
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--fmax", type=float, default=FMAX)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--names", help="relax only these structures, separated by commas")
    parser.add_argument("--ends", type=Path, help="new file for the relaxed structures")
    arguments = parser.parse_args()
    structures = named(read(arguments.structures), arguments.names)
    for atoms in structures:
        atoms.info.pop("total_spin", None)
    potential = load_mean_force_field(arguments.force_field)
    if arguments.part == "relax":
        kind = arguments.kind
        chosen = [atoms for atoms in structures if kind in (None, atoms.info["kind"])]
        options = {name: getattr(arguments, name) for name in ("fmax", "max_steps", "dtype")}
        options["batch_atoms"] = arguments.batch_atoms
        lines, total = relax(chosen, potential, arguments.rounds, arguments.ends, **options)
    else:
        program = arguments.program
        chosen = [atoms for atoms in structures if atoms.info["force_field"] == program]
        lines, total = paths(chosen, potential)
    arguments.results.write_text("".join(json.dumps(line) + "\n" for line in [*lines, total]))
    for line in [*lines, total]:
        print(line)


if __name__ == "__main__":
    main()
