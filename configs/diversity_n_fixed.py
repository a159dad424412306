"""More molecules or more conformers of each, at a fixed number of structures?

    python -m mlip_jax.main --config=configs/diversity_n_fixed.py --workdir=runs/n_fixed --sweep \\
        --config.data.path=GEOM --config.diversity.ood_path=GEOM_QM9
    python -m mlip_jax.main --config=configs/diversity_report.py --workdir=runs/diversity --config.sweeps=runs/n_fixed

Budgets of N = 50k, 200k, 800k and 3.2M structures, of N / n_c molecules with n_c = 1, 2, 4, 8 or 16 conformers each;
three seeds, each with a split, a draw and parameters of its own: sixty runs. TorchMD-Net's equivariant transformer with
8 layers of 128 channels, squared errors of the energy alone, Adam, a cosine from 1e-4 to 1e-8, as in Shenoy et al.
(arXiv:2311.00862). The number of updates is the same in all runs, so that they cost the same.

Every run is tested on unseen molecules (IID-S), molecules of another data set (OOD-S), and unseen conformers of its own
molecules near to a training conformer (IID-C) and far from it (OOD-C); diversity.json in its folder has the errors. The
same command goes on with what is not complete. As a job array: sbatch --array=0-59 launch/slurm.sbatch with it.

On a smaller machine, one number scales budgets and updates; `grid` takes the first so many budgets, `conformers` the
n_c up to that one, `seeds` the first so many, `model` another architecture, and `selection=maxmin` molecules that are
as unlike each other as can be, by their fingerprints, in place of a draw; `selection=embedding` by the features of a
trained force field, --config.data.selection_force_field=WORKDIR. N = 4k and 16k with PaiNN, on data that the package
makes itself (configs/geom_like.py):

    --config=configs/diversity_n_fixed.py:scale=0.08,grid=2,model=painn

Every molecule must have as many conformers as the largest n_c (and more, which are tested on). Where labels are dear,
--config.data.fewer_conformers=last lets molecules of fewer in after all others: a set for N = 16k then needs 16
conformers of 1,000 molecules, 2 of 8,000 and 1 of 16,000.

Energies alone are trained on, so that an update computes no forces. With `beta=0.9` that weight is given to the
forces, which the data must have then; their errors are among the results, and the report shows them by
--config.metric=force_mae_mev_per_ang.
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
MODELS = spice.MODELS | {"equivariant_transformer": dict(num_features=128, num_layers=8, num_heads=8, cutoff=5.0,
                                                         num_radial=64)}


def arguments(text: str) -> dict:
    """{"scale": 1.0, "grid": 4, "model": ..., ...} of "scale=0.08,grid=2,model=painn"."""
    found = {"scale": 1.0, "grid": len(BUDGETS), "model": "equivariant_transformer", "conformers": max(CONFORMERS),
             "seeds": len(SEEDS), "selection": "random", "beta": 0.0}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in found or not equals:
            raise ValueError(f"argument of this config: {unknown_name('name', name, found)} Received {text!r}")
        found[name] = type(found[name])(value)
    if not 0 < found["scale"] <= 1 or not 1 <= found["grid"] <= len(BUDGETS):
        raise ValueError(f"scale must be above 0 and at most 1, and grid from 1 to {len(BUDGETS)}; received {text!r}")
    if found["conformers"] not in CONFORMERS or not 1 <= found["seeds"] <= len(SEEDS):
        raise ValueError(f"conformers must be one of {', '.join(map(str, CONFORMERS))}, and seeds from 1 to "
                         f"{len(SEEDS)}; received {text!r}")
    if not 0 <= found["beta"] < 1:
        raise ValueError("beta, the weight of forces, must be 0 (energies alone) or more and below 1, for energies are "
                         f"compared; received {text!r}")
    if found["selection"] not in SELECTIONS:
        raise ValueError(unknown_name("selection of molecules", found["selection"], SELECTIONS))
    if found["model"] not in MODELS:
        raise ValueError(unknown_name("model of this config", found["model"], MODELS))
    return found


def get_config(text: str = "") -> ml_collections.ConfigDict:
    given = arguments(text)
    c = diversity_defaults()
    c.data.elements = ("H", "C", "N", "O", "F", "S", "Cl")
    c.data.charge = 0.0
    c.data.require = "both" if given["beta"] else "energy"
    c.data.split = "molecule"
    c.data.split_seed = c.get_ref("seed")
    # more than there are, so that all are dealt out in these proportions
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
    """Which n_c and which seeds there are by `arguments`."""
    return tuple(n for n in CONFORMERS if n <= given["conformers"]), SEEDS[:given["seeds"]]


def sweep(text: str = "") -> list[dict]:
    given = arguments(text)
    conformers, seeds = draws(given)
    budgets = [round(given["scale"] * budget) for budget in BUDGETS[:given["grid"]]]
    return [{"name": f"N{total}-c{n_c}-s{v['seed']}", "data.num_molecules": n_s, "data.num_conformers": n_c, **v}
            for total in budgets for n_s, n_c in budget_grid(total, conformers) for v in product({"seed": seeds})]
