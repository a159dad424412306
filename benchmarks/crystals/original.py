"""Relax crystals and optimize reaction paths with ASE and the original program of a force field.

Runs in the environment of the program, on one core:

    taskset -c 0 python original.py relax sevennet FOLDER/crystals.json RESULTS.jsonl
    taskset -c 0 python original.py relax mace FOLDER/alloys.json RESULTS.jsonl --model=FILE
    taskset -c 0 python original.py neb so3lr FOLDER/reactions.json RESULTS.jsonl

Crystals are relaxed with BFGS and FrechetCellFilter, surfaces with BFGS. Structures whose results are
in the file are skipped. A line has the processor time of a structure, without the first evaluation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import numpy as np
from ase import Atoms
from ase.db import connect
from ase.filters import FrechetCellFilter
from ase.mep import NEB
from ase.optimize import BFGS

FMAX, MAX_STEPS, NEB_FMAX, NUM_IMAGES = 0.02, 300, 0.02, 5


def calculator(program: str, model: str | None, precision: str):
    """Return the calculator of a program, as its documentation recommends.

    For SevenNet in float64, everything that the program rounds to float32 is kept in float64.
    """
    if program == "sevennet":
        import sevenn.util
        import torch
        from sevenn.calculator import SevenNetCalculator

        calc = SevenNetCalculator(model or "7net-0", device="cpu")
        if precision == "float64":
            calc.model = calc.model.double()
            torch.set_default_dtype(torch.float64)
            torch.Tensor.float = torch.Tensor.double
            single = sevenn.util.dtype_correct
            sevenn.util.dtype_correct = lambda value: single(value, torch.float64)
        return calc
    if precision != "float32":
        raise SystemExit("only SevenNet has --precision")
    if program == "mace":
        from mace.calculators import MACECalculator

        return MACECalculator(model, device="cpu", default_dtype="float32")
    from so3krates_torch.calculator.so3 import TorchkratesCalculator

    package = importlib.util.find_spec("so3krates_torch").submodule_search_locations[0]
    return TorchkratesCalculator(
        model_paths=str(Path(package) / "pretrained/so3lr/so3lr.model"),
        r_max_lr=12.0,
        dispersion_energy_cutoff_lr_damping=2.0,
        default_dtype="float32",
        compute_stress=True,
    )


def read(path: Path) -> list:
    """Return the structures of a file; `info` has their names and kinds."""
    structures = []
    for row in connect(path).select():
        atoms = row.toatoms()
        atoms.calc = None
        atoms.info = dict(row.data)
        structures.append(atoms)
    return structures


def named(structures: list, names: str | None) -> list:
    """Return the structures with these names, separated by commas; all by default."""
    if names is None:
        return structures
    chosen = [atoms for atoms in structures if atoms.info["name"] in names.split(",")]
    if len(chosen) != len(names.split(",")):
        raise SystemExit(f"no structure for each of {names}")
    return chosen


def write(path: Path, structures: list) -> None:
    """Append structures with their names and kinds to a file that `read` reads."""
    with connect(path) as file:
        for atoms in structures:
            file.write(Atoms(atoms), data={k: atoms.info[k] for k in ("name", "kind")})


def relax(atoms, calc) -> dict:
    """Relax a structure; return the line of its result."""
    atoms.calc = calc
    atoms.get_forces()
    calc.reset()
    begin = time.process_time()
    cell = atoms.info["kind"] != "surface"
    optimizer = BFGS(FrechetCellFilter(atoms) if cell else atoms, logfile=None)
    converged = optimizer.run(fmax=FMAX, steps=MAX_STEPS)
    return {
        "atoms": len(atoms),
        "kind": atoms.info["kind"],
        "energy": float(atoms.get_potential_energy()),
        "volume": float(atoms.get_volume()) if cell else None,
        "steps": optimizer.nsteps,
        "converged": bool(converged),
        "cpu_s": time.process_time() - begin,
    }


def path_of(first, last, calc) -> dict:
    """Optimize a path; return the line of its result."""
    begin, ends, steps = time.process_time(), [first, last], 0
    for end in ends:
        end.calc = calc
        optimizer = BFGS(end, logfile=None)
        optimizer.run(fmax=NEB_FMAX, steps=MAX_STEPS)
        steps += optimizer.nsteps
        energy, forces = end.get_potential_energy(), end.get_forces()
        end.info["energy"], end.info["fmax"] = energy, float(np.abs(forces).max())
    if not first.pbc.any() and not first.constraints:
        from ase.build import minimize_rotation_and_translation

        minimize_rotation_and_translation(first, last)
    images = [first, *(first.copy() for _ in range(NUM_IMAGES)), last]
    band = NEB(images, k=0.1, climb=True, method="improvedtangent", allow_shared_calculator=True)
    band.interpolate("idpp", mic=bool(first.pbc.any()))
    for image in images:
        image.calc = calc
    optimizer = BFGS(band, logfile=None)
    converged = optimizer.run(fmax=NEB_FMAX, steps=MAX_STEPS)
    energies = [float(image.get_potential_energy()) for image in images]
    return {
        "atoms": len(first),
        "barrier": max(energies) - energies[0],
        "reaction_energy": energies[-1] - energies[0],
        "steps": optimizer.nsteps,
        "end_steps": steps,
        "converged": bool(converged),
        "cpu_s": time.process_time() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("relax", "neb"))
    parser.add_argument("program", choices=("sevennet", "mace", "so3lr"))
    parser.add_argument("structures", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", help="file of the force field")
    parser.add_argument("--precision", default="float32", choices=("float32", "float64"))
    parser.add_argument("--names", help="relax only these structures, separated by commas")
    parser.add_argument("--ends", type=Path, help="new file for the relaxed structures")
    arguments = parser.parse_args()
    calc = calculator(arguments.program, arguments.model, arguments.precision)
    structures = named(read(arguments.structures), arguments.names)
    done = set()
    if arguments.results.is_file():
        done = {json.loads(line)["name"] for line in arguments.results.read_text().splitlines()}
    if arguments.program == "so3lr":
        for atoms in structures:
            atoms.info |= {"charge": 0.0, "total_spin": 0.0}
    step = 1 if arguments.part == "relax" else 2
    for start in range(0, len(structures), step):
        atoms = structures[start]
        name = atoms.info["name"]
        if name in done or atoms.info.get("force_field", arguments.program) != arguments.program:
            continue
        ends = structures[start : start + step]
        line = (relax if arguments.part == "relax" else path_of)(*ends, calc)
        with open(arguments.results, "a") as file:
            print(json.dumps({"name": name} | line), file=file)
        print(name, line, flush=True)
        if arguments.ends:
            write(arguments.ends, ends)


if __name__ == "__main__":
    main()
