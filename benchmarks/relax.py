"""Relaxation in batches against ASE one by one and torch-sim, with the same PaiNN; and what a minimiser itself costs.

    python benchmarks/relax.py all --home=DIR --pin=0
    python benchmarks/relax.py painn morse --home=DIR --pin=0 --only=ours --rounds=3
    python benchmarks/relax.py painn --home=DIR --force_field=runs/qcr   # ours alone, with a force field of your own
    python benchmarks/relax.py table --home=DIR      # of the last results there, nothing is measured

Parts: `environments` (PyTorch, SchNetPack and torch-sim in DIR), `painn` (drugs as RDKit embeds them; the weights are
SchNetPack's, trained for some minutes, once), `morse` (drops of 40 atoms under a Morse potential: the model costs next
to nothing), `check` (steps of 50 of the drugs are those of ASE's BFGS in float64), `table`. Everything that is measured
is a process of its own; compiling is part of no rate.
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
CONFORMATIONS = 50  # of each drug, to train on
TIME_LIMIT = 3600
TORCH_SIM_ATOMS = 2000  # in flight with PaiNN


class Job(NamedTuple):
    """What a measuring process is asked for.

    Attributes:
      part: batched, ase or weights. method: Minimiser. model, options: See cases.Case.
      work: File of starts (of training structures for weights). weights: File of SchNetPack's PaiNN, or a force field.
      batch: Molecules. batches: To train on. atoms: Of a batch; 0: the package's own choice.
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
    """One row of a table: its case, and part, method and atoms of its job."""

    case: Case
    part: str
    method: str
    atoms: int = 0


def rows(model: str) -> list[Row]:
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
    """`count` geometries of the drugs by RDKit, each drug once before any comes again."""
    from mlip_jax.datasets.molecules.files import read_molecules

    path = folder / f"starts-{count}.npz"
    if not path.is_file():
        drugs = sum(bool(line.strip()) for line in DRUGS.read_text().splitlines())
        conformers = -(-count // drugs)
        found = [
            record
            for record in read_molecules(DRUGS, num_conformers=conformers)
            if record.atoms is not None
        ]
        found.sort(key=lambda record: (record.index % conformers, record.index))
        atoms = [record.atoms for record in found][:count]
        if len(atoms) < count:
            raise ValueError(f"{DRUGS} gave {len(atoms)} geometries, {count} were asked for")
        np.savez(
            path,
            offsets=np.cumsum([0, *map(len, atoms)]),
            numbers=np.concatenate([a.numbers for a in atoms]),
            positions=np.concatenate([a.positions for a in atoms]),
        )
    return path


def make_weights(runner: Runner, folder: Path) -> Path:
    """A PaiNN that SchNetPack trains a little on conformations of the drugs."""
    path = folder / "painn.npz"
    if not path.is_file():
        work = make_work(folder, None, CONFORMATIONS)
        case = Case("weights", SCHNETPACK, "painn", PAINN)
        found = runner.start(
            case, Job("weights", "", "painn", PAINN, str(work), str(path), **TRAINING)
        )
        if "failed" in found:
            sys.exit(f"no weights: {found['failed']}")
        print(
            f"  weights: {found['force_error']:.3g} eV/Å mean absolute force error after {found['batches']} batches"
        )
    return path


def measure(runner: Runner, model: str, folder: Path, arguments: argparse.Namespace) -> None:
    """The rows of one table, in turn in each round."""
    starts = make_starts(folder, arguments.molecules)
    weights = arguments.force_field or make_weights(runner, folder) if model == "painn" else ""
    for number in range(arguments.rounds):
        for row in rows(model):
            if arguments.only and not any(text in row.case.name for text in arguments.only):
                continue
            if arguments.force_field and model == "painn" and row.case.environment != OURS:
                continue  # the peers run SchNetPack's weights alone
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
    """Our steps against those of ASE."""
    job = Job(
        "check",
        "bfgs",
        "painn",
        PAINN,
        str(make_starts(folder, molecules)),
        str(make_weights(runner, folder)),
        CHECKED,
    )
    found = runner.start(Case("check", OURS, "painn", PAINN), job)
    if "failed" in found:
        sys.exit(f"check: {found['failed']}")
    print(
        f"  check: {found['same_number_of_steps']} of {found['molecules']} molecules take as many steps as under ASE "
        f"(lowest, median, highest: {found['steps']}); an atom deviates by {found['largest_deviation']:.2g} Å at "
        "most over the first 60 steps",
        *found["others"],
        flush=True,
    )


def report(lines: Sequence[tables.Line]) -> str:
    """Both tables, as far as there are lines for them."""
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
    found = []
    for name in dict.fromkeys(line["case"] for line in lines):
        of_case = [line for line in lines if line["case"] == name]

        def of(key, of_case=of_case):
            return tables.summary([line.get(key) for line in of_case])

        first = of_case[0]
        compiled = (
            "-" if "compiles" not in first else f"{first['compiles']} in {first['sizes']} size(s)"
        )
        found.append(
            [
                name,
                f"{first['molecules']}",
                of("molecules_per_cpu_s"),
                of("cpu_ms_per_step"),
                of("model_share"),
                f"{first['molecule_steps'] / first['molecules']:.0f}",
                f"{first['converged']}",
                of("minimizer_ms"),
                of("neighbors_ms"),
                of("model_ms"),
                compiled,
                of("peak_mib"),
            ]
        )
    return tables.markdown(
        [
            "what",
            "molecules",
            "molecules per CPU-second",
            "CPU ms per molecule-step",
            "share of the model",
            "mean steps",
            "converged",
            "minimiser alone, ms",
            "neighbours alone",
            "model alone",
            "programs",
            "peak MiB",
        ],
        found,
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
        "--only", action="append", default=[], help="rows with this in their name; may be repeated"
    )
    parser.add_argument(
        "--force_field", help="in place of SchNetPack's weights, for the rows that are ours"
    )
    parser.add_argument("--molecules", type=int, default=200)
    parser.add_argument(
        "--peer_molecules", type=int, default=60, help="the first ones, for the slower peers"
    )
    parser.add_argument(
        "--pin", type=int, help="core that every process is bound to, with one thread"
    )
    parser.add_argument(
        "--untuned",
        action="store_true",
        help="the allocator as the system has it, for all packages",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--torch", default=environments.TORCH, help="version of PyTorch in the peers' environments"
    )
    parser.add_argument(
        "--results", type=Path, help="file of the results; default: one in --home for each start"
    )
    arguments = parser.parse_args()
    parts = PARTS if "all" in arguments.parts else arguments.parts
    home = arguments.home.resolve()
    folder = home / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if list(parts) == ["table"]:
        path = arguments.results or max(home.glob("relax-*.jsonl"), default=None)
        if path is None:
            sys.exit(f"{home} holds no relax-*.jsonl; measure first")
        print(report(tables.read(path)))
        return
    if "environments" in parts:
        for name in (SCHNETPACK, TORCH_SIM):
            print(
                f"environment v_{name}: {environments.make(home, name, arguments.torch) or 'is there'}",
                flush=True,
            )
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
