"""Compare more molecules with more conformers per molecule, at a fixed number of structures.

    python -m mlip_jax.main --config=configs/diversity_n_fixed.py --workdir=runs/n_fixed --sweep \\
        --config.data.path=GEOM --config.diversity.ood_path=GEOM_QM9
    python -m mlip_jax.main --config=configs/diversity_report.py --workdir=runs/diversity \\
        --config.sweeps=runs/n_fixed

The budgets are N = 50k, 200k, 800k and 3.2M structures, of N / n_c molecules with n_c = 1, 2,
4, 8 or 16 conformers each. With three seeds, each with its own split, selection and initial
parameters, these are sixty runs. The model is TorchMD-Net's equivariant transformer with 8
layers of 128 channels, trained on squared errors of energies only by Adam with a cosine
schedule from 1e-4 to 1e-8, as in Shenoy et al. (arXiv:2311.00862). All runs have the same
number of training steps, so they cost the same.

Every run is tested on held-out molecules (IID-S), on molecules of another data set (OOD-S), and
on held-out conformers of its own molecules close to a training conformer (IID-C) and far from
it (OOD-C). diversity.json in its folder contains the errors. Rerun the same command to complete
the sweep. Job array: sbatch --array=0-59 launch/slurm.sbatch, with the same options.

The argument of the config adapts the study to smaller machines: `scale` is a factor to budgets
and training steps, `grid` the number of budgets, `conformers` the largest n_c, `seeds` the
number of seeds, and `model` the architecture. `selection=maxmin` selects the most dissimilar
molecules by their fingerprints instead of random ones; `selection=embedding` does so by the
features of a force field, --config.data.selection_force_field=WORKDIR. N = 4k and 16k with
PaiNN, on data that the package generates (configs/geom_like.py):

    --config=configs/diversity_n_fixed.py:scale=0.08,grid=2,model=painn

Every molecule must have as many conformers as the largest n_c, and more for the tests. If
labels are expensive, --config.data.below_min_conformers=last adds molecules with fewer
conformers after all others: N = 16k then requires 16 conformers of 1,000 molecules, 2 of 8,000
and 1 of 16,000.

Training uses energies only, so a training step computes no forces. `beta=0.9` gives the forces
that weight, and the data must contain forces. The results then include force errors, which
--config.metric=force_mae_mev_per_ang selects for the report.
"""

import ml_collections

from mlip_jax.config import unknown_name
from mlip_jax.configs import spice
from mlip_jax.datasets.selection.subsets import SELECTIONS, budget_grid
from mlip_jax.defaults import diversity_defaults
from mlip_jax.sweeps import product

BUDGETS = (50_000, 200_000, 800_000, 3_200_000)
CONFORMERS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)
STEPS = 500_000  # at scale 1, the choice of this file
LEAST_STEPS = 2_000
MODELS = spice.MODELS | {
    "equivariant_transformer": dict(
        num_features=128, num_layers=8, num_heads=8, cutoff=5.0, num_radial=64
    )
}


def arguments(text: str) -> dict:
    """Parse the argument, such as "scale=0.08,grid=2", into a dictionary with all options."""
    options = {
        "scale": 1.0,
        "grid": len(BUDGETS),
        "model": "equivariant_transformer",
        "conformers": max(CONFORMERS),
        "seeds": len(SEEDS),
        "selection": "random",
        "beta": 0.0,
    }
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in options or not equals:
            raise ValueError(
                f"argument of this config: {unknown_name('name', name, options)} Received {text!r}"
            )
        options[name] = type(options[name])(value)
    if not 0 < options["scale"] <= 1 or not 1 <= options["grid"] <= len(BUDGETS):
        raise ValueError(
            f"scale must be above 0 and at most 1, and grid from 1 to {len(BUDGETS)}, "
            f"received {text!r}"
        )
    if options["conformers"] not in CONFORMERS or not 1 <= options["seeds"] <= len(SEEDS):
        raise ValueError(
            f"conformers must be one of {', '.join(map(str, CONFORMERS))}, and seeds from 1 to "
            f"{len(SEEDS)}, received {text!r}"
        )
    if not 0 <= options["beta"] < 1:
        raise ValueError(
            "beta, the weight of forces, must be at least 0 (energies only) and below 1, because "
            f"energies are compared, received {text!r}"
        )
    if options["selection"] not in SELECTIONS:
        raise ValueError(unknown_name("selection of molecules", options["selection"], SELECTIONS))
    if options["model"] not in MODELS:
        raise ValueError(unknown_name("model of this config", options["model"], MODELS))
    return options


def get_config(text: str = "") -> ml_collections.ConfigDict:
    given = arguments(text)
    c = diversity_defaults()
    c.data.elements = ("H", "C", "N", "O", "F", "S", "Cl")
    c.data.charge = 0.0
    c.data.require = "both" if given["beta"] else "energy"
    c.data.split = "molecule"
    c.data.split_seed = c.get_ref("seed")
    # larger than any data set, so that all structures are split in these proportions
    c.data.num_train, c.data.num_valid, c.data.num_test = 80_000_000, 5_000_000, 15_000_000
    c.data.num_molecules, c.data.num_conformers = round(given["scale"] * BUDGETS[0]), 1
    c.data.min_conformers, c.data.selection = given["conformers"], given["selection"]

    c.model.name = given["model"]
    c.model.options = ml_collections.ConfigDict(MODELS[given["model"]])

    c.loss.penalty = "mse"
    c.loss.energy_per_atom = False
    c.loss.beta = c.loss.beta_end = given["beta"]  # at 0 no forces are computed

    c.optimizer.name = "adam"
    c.optimizer.learning_rate, c.optimizer.learning_rate_end = 1e-4, 1e-8
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 200

    c.train.num_steps = max(round(given["scale"] * STEPS), LEAST_STEPS)
    c.train.batch_size = 64
    c.train.valid_every = c.train.checkpoint_every = max(c.train.num_steps // 50, 100)
    return c


def draws(given: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of conformers n_c and the seeds of the parsed `arguments`."""
    return tuple(n for n in CONFORMERS if n <= given["conformers"]), SEEDS[: given["seeds"]]


def sweep(text: str = "") -> list[dict]:
    given = arguments(text)
    conformers, seeds = draws(given)
    budgets = [round(given["scale"] * budget) for budget in BUDGETS[: given["grid"]]]
    return [
        {
            "name": f"N{total}-c{n_c}-s{v['seed']}",
            "data.num_molecules": n_s,
            "data.num_conformers": n_c,
            **v,
        }
        for total in budgets
        for n_s, n_c in budget_grid(total, conformers)
        for v in product({"seed": seeds})
    ]
