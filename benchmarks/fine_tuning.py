"""Compare the search of configs/fine_tune.py with four fixed recipes, on one file.

    python benchmarks/fine_tuning.py mine.xyz --workdir=runs/tuned --num_steps=200

The fixed recipes are those that one would choose without a search: first layers frozen, low-rank
updates, full training, and full training with replay, each with one learning rate. They continue the
runs of the search up to the same number of steps.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from mlip_jax import config as configs
from mlip_jax.defaults import fine_tune_defaults
from mlip_jax.sweeps.overrides import override
from mlip_jax.tasks import fine_tune
from mlip_jax.tasks.fine_tune.recipes import Candidate
from mlip_jax.tasks.fine_tune.search import ENERGY, FORCE, forgetting
from mlip_jax.workdir import write_json

FIXED = (
    Candidate("frozen", 3e-4),
    Candidate("low_rank", 1e-3),
    Candidate("full", 3e-4),
    Candidate("full_replay", 3e-4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--force_field", default="drugs-gfn2")
    parser.add_argument("--labels", type=int, default=100, help="training structures")
    parser.add_argument("--valid", type=int, default=25, help="validation structures")
    parser.add_argument("--test", type=int, default=150, help="test structures")
    parser.add_argument("--num_steps", type=int, default=200)
    parser.add_argument("--recipes", default="frozen,low_rank,full,full_replay")
    parser.add_argument(
        "--rates",
        default="1e-3,3e-4",
        help="learning rates; a single one is also that of all recipes",
    )
    a = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    for noisy in ("absl", "orbax"):
        logging.getLogger(noisy).setLevel("WARNING")
    rates = tuple(map(float, a.rates.split(",")))
    fixed = FIXED if len(rates) > 1 else [Candidate(c.recipe, *rates) for c in FIXED]
    config = override(
        fine_tune_defaults(),
        {
            "force_field": a.force_field,
            "data.path": a.data,
            "data.num_train": a.labels,
            "data.num_valid": a.valid,
            "data.num_test": a.test,
            "num_steps": a.num_steps,
            "recipes": tuple(a.recipes.split(",")),
            "learning_rates": rates,
            "curve": (),
        },
    )
    workdir = Path(a.workdir)
    fine_tune.run(config, workdir)
    search = fine_tune.prepare(configs.complete(config, fine_tune_defaults()), workdir)
    before = search.evaluate(search.refitted())
    rows = {"start": before}
    for candidate in fixed:
        rows[candidate.name] = search.train(candidate, max(search.files), a.num_steps)
    for candidate in search.candidates():
        if (result := search.journal.get(f"runs/{candidate.name}", a.num_steps)) is not None:
            rows[candidate.name] = result
    write_json(workdir / "fixed.json", rows)
    for name, row in rows.items():
        lost = forgetting(before["probe"], row["probe"])
        print(
            f"{name:20} test {row['test'][FORCE]:7.1f} meV/Å {row['test'][ENERGY]:7.2f} meV/atom, "
            f"valid {row['valid'][FORCE]:7.1f}, old {row['probe'][FORCE]:7.1f} "
            f"({100 * (lost or 0):+.0f} %)"
        )


if __name__ == "__main__":
    main()
