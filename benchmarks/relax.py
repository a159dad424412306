"""Batched relaxation against ASE one by one and torch-sim, with the same PaiNN or Morse potential.

    python benchmarks/relax.py all --home=DIR --pin=0
    python benchmarks/relax.py painn morse --home=DIR --pin=0 --only=ours --rounds=3
    python benchmarks/relax.py painn --home=DIR --force_field=runs/qcr  # ours, your force field
    python benchmarks/relax.py table --home=DIR                         # tables of results

Parts: `environments` (PyTorch, SchNetPack and torch-sim in DIR), `painn` (RDKit geometries of
drugs, with weights that SchNetPack trains once in a few minutes), `morse` (drops of 40 atoms with a
Morse potential, where the minimizer dominates the cost), `check` (compares the steps for 50 drugs
with ASE's BFGS in float64), `table`. Each measurement is a separate process. Rates exclude
compilation.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import environments, tables
from benchmarks.cases import OURS, PAINN, Case
from benchmarks.models import Runner
from benchmarks.work import DRUGS, make_work

PARTS = ("environments", "check", "painn", "morse", "table")
CHECKED = 50
SCHNETPACK, TORCH_SIM = "spk", "ts"
DRIVERS = {
    OURS: ROOT / "benchmarks" / "ours_relax.py",
    SCHNETPACK: ROOT / "benchmarks" / "peers" / "run_relax_schnetpack.py",
    TORCH_SIM: ROOT / "benchmarks" / "peers" / "run_torchsim.py",
}
TRAINING = {"batch": 32, "batches": 90}
CONFORMATIONS = 50  # training conformations per drug
TIME_LIMIT = 3600  # seconds per process
TORCH_SIM_ATOMS = 2000  # number of atoms in a batch of torch-sim with PaiNN


class Job(NamedTuple):
    """Job of a measuring process.

    Attributes:
      part: "batched", "ase" or "weights".
      method: Minimizer.
      model: Name of the model, see cases.Case.
      options: Options of the model, see cases.Case.
      work: File of start geometries; of training structures for part weights.
      weights: File of SchNetPack's PaiNN, or a force field.
      batch: Number of molecules.
      batches: Number of training batches.
      atoms: Number of atoms per batch; 0 selects the default of the package.
    """

    part: str
    method: str
    model: str
    options: Mapping[str, Any]
    work: str
    weights: str
    batch: int
    batches: int = 0
    atoms: int = 0


class Row(NamedTuple):
    """Row of a table: its case, and part, method and atoms of its job."""

    case: Case
    part: str
    method: str
    atoms: int = 0


def rows(model: str) -> list[Row]:
    """Return the rows of the table of a model."""

    def row(name, environment, part, method, atoms=0):
        return Row(Case(f"{name} {method}", environment, model, PAINN), part, method, atoms)

    ours = [row("ours", OURS, "batched", method) for method in ("bfgs", "lbfgs", "fire")]
    if model == "morse":
        return [
            *ours,
            *(
                row("torch-sim", TORCH_SIM, "batched", method, 4 * TORCH_SIM_ATOMS)
                for method in ("bfgs", "lbfgs", "fire")
            ),
        ]
    return [
        ours[0],
        row("ours under ASE", OURS, "ase", "bfgs"),
        *ours[1:],
        row("SchNetPack under ASE", SCHNETPACK, "ase", "bfgs"),
        *(
            row("torch-sim", TORCH_SIM, "batched", method, TORCH_SIM_ATOMS)
            for method in ("bfgs", "fire")
        ),
    ]


def make_starts(folder: Path, count: int) -> Path:
    """Write `count` RDKit geometries of the drugs, the first of each drug before any second one."""
    from mlip_jax.datasets.molecules.files import read_molecules

    path = folder / f"starts-{count}.npz"
    if not path.is_file():
        drugs = sum(bool(line.strip()) for line in DRUGS.read_text().splitlines())
        conformers = -(-count // drugs)
        records = [
            record
            for record in read_molecules(DRUGS, num_conformers=conformers)
            if record.atoms is not None
        ]
        records.sort(key=lambda record: (record.index % conformers, record.index))
        atoms = [record.atoms for record in records][:count]
        if len(atoms) < count:
            raise ValueError(f"{DRUGS}: only {len(atoms)} of {count} geometries could be generated")
        np.savez(
            path,
            offsets=np.cumsum([0, *map(len, atoms)]),
            numbers=np.concatenate([a.numbers for a in atoms]),
            positions=np.concatenate([a.positions for a in atoms]),
        )
    return path


def make_weights(runner: Runner, folder: Path) -> Path:
    """Return the path of the weights, which SchNetPack trains on conformations of the drugs."""
    path = folder / "painn.npz"
    if not path.is_file():
        work = make_work(folder, None, CONFORMATIONS)
        case = Case("weights", SCHNETPACK, "painn", PAINN)
        result = runner.start(
            case, Job("weights", "", "painn", PAINN, str(work), str(path), **TRAINING)
        )
        if "failed" in result:
            sys.exit(f"training of the weights failed: {result['failed']}")
        print(
            f"  weights: {result['force_error']:.3g} eV/Å mean absolute force error after "
            f"{result['batches']} batches"
        )
    return path


def measure(runner: Runner, model: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Measure the rows of one table, in turn in each round."""
    starts = make_starts(folder, arguments.molecules)
    weights = arguments.force_field or make_weights(runner, folder) if model == "painn" else ""
    for number in range(arguments.rounds):
        for row in rows(model):
            if arguments.only and not any(text in row.case.name for text in arguments.only):
                continue
            if arguments.force_field and model == "painn" and row.case.environment != OURS:
                continue  # the other packages only run SchNetPack's weights
            count = (
                arguments.molecules if row.case.environment == OURS else arguments.peer_molecules
            )
            job = Job(
                row.part,
                row.method,
                model,
                PAINN,
                str(starts),
                str(weights),
                count,
                atoms=row.atoms,
            )
            runner.measure(row.case, job, model, number)


def check(runner: Runner, folder: Path, molecules: int) -> None:
    """Compare our steps with those of ASE."""
    job = Job(
        "check",
        "bfgs",
        "painn",
        PAINN,
        str(make_starts(folder, molecules)),
        str(make_weights(runner, folder)),
        CHECKED,
    )
    result = runner.start(Case("check", OURS, "painn", PAINN), job)
    if "failed" in result:
        sys.exit(f"check: {result['failed']}")
    print(
        f"  check: {result['same_number_of_steps']} of {result['molecules']} molecules take as "
        f"many steps as with ASE (lowest, median, highest: {result['steps']}); largest deviation "
        f"in the first 60 steps {result['largest_deviation']:.2g} Å",
        *result["others"],
        flush=True,
    )


def report(lines: Sequence[tables.Line]) -> str:
    """Return the tables of the models that have results."""
    good = [line for line in lines if "failed" not in line]
    sections = [
        f"Measured on {machine}." for machine in dict.fromkeys(line["machine"] for line in good)
    ]
    for model in ("painn", "morse"):
        of_model = [line for line in good if line["part"] == model]
        if of_model:
            sections += [f"{model}:", _table(of_model)]
    return "\n\n".join(
        [
            *sections,
            *(
                f"Not measured: {line['part']} {line['case']}: {line['failed']}"
                for line in lines
                if "failed" in line
            ),
        ]
    )


def _table(lines: Sequence[tables.Line]) -> str:
    cells = []
    for name in dict.fromkeys(line["case"] for line in lines):
        of_case = [line for line in lines if line["case"] == name]

        def median(key, of_case=of_case):
            return tables.summary([line.get(key) for line in of_case])

        first = of_case[0]
        compiled = (
            "-" if "compiles" not in first else f"{first['compiles']} in {first['sizes']} size(s)"
        )
        cells.append(
            [
                name,
                f"{first['molecules']}",
                median("molecules_per_cpu_s"),
                median("cpu_ms_per_step"),
                median("model_share"),
                f"{first['molecule_steps'] / first['molecules']:.0f}",
                f"{first['converged']}",
                median("minimizer_ms"),
                median("neighbors_ms"),
                median("model_ms"),
                compiled,
                median("peak_mib"),
            ]
        )
    return tables.markdown(
        [
            "program",
            "molecules",
            "molecules per CPU-second",
            "CPU ms per molecule-step",
            "share of the model",
            "mean steps",
            "converged",
            "minimizer separately, ms",
            "neighbors separately",
            "model separately",
            "compiled programs",
            "peak MiB",
        ],
        cells,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "all"))
    parser.add_argument(
        "--home", type=Path, required=True, help="folder of environments, data and results"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="text in the names of the rows; repeatable"
    )
    parser.add_argument(
        "--force_field", help="force field to use in our rows instead of SchNetPack's weights"
    )
    parser.add_argument("--molecules", type=int, default=200)
    parser.add_argument(
        "--peer_molecules", type=int, default=60, help="number of molecules for other packages"
    )
    parser.add_argument(
        "--pin", type=int, help="core that every process is bound to, with one thread"
    )
    parser.add_argument(
        "--untuned", action="store_true", help="use the default allocator for all packages"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--torch", default=environments.TORCH, help="version of PyTorch for other packages"
    )
    parser.add_argument(
        "--results", type=Path, help="file of the results; default: a new file in --home"
    )
    arguments = parser.parse_args()
    parts = PARTS if "all" in arguments.parts else arguments.parts
    home = arguments.home.resolve()
    folder = home / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if list(parts) == ["table"]:
        path = arguments.results or max(home.glob("relax-*.jsonl"), default=None)
        if path is None:
            sys.exit(f"{home}: no relax-*.jsonl. Run the measurements first.")
        print(report(tables.read(path)))
        return
    if "environments" in parts:
        for name in (SCHNETPACK, TORCH_SIM):
            problem = environments.make(home, name, arguments.torch)
            print(f"environment v_{name}: {problem or 'installed'}", flush=True)
    runner = Runner(
        home,
        arguments.results or home / f"relax-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl",
        arguments.pin,
        not arguments.untuned,
        DRIVERS,
        TIME_LIMIT,
    )
    if "check" in parts:
        check(runner, folder, arguments.molecules)
    for model in ("painn", "morse"):
        if model in parts:
            measure(runner, model, folder, arguments)
    if runner.lines:
        print(f"\n{report(runner.lines)}\n\n{runner.results}")


if __name__ == "__main__":
    main()
