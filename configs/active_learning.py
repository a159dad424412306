"""Train a force field within a budget of labels, which active learning spends.

    python -m mlip_jax.main --config=configs/active_learning.py --config.input=molecules.smi
    python -m mlip_jax.main --config=configs/active_learning.py --config.input=molecules.smi \\
        --config.budget=300 --config.control=random --workdir=runs/budget

The molecules are a file of SMILES, of structures, or a store of unlabeled candidates. Each round
proposes candidates, chooses those that are uncertain and far from all labeled ones, labels them with
GFN2-xTB on all cores, and trains on all labels. Any ASE calculator can label:
--config.oracle.method=package.module:Class. An interrupted run resumes with the same command, and no
structure is labeled twice. See docs/active_learning.md.

Hardware: CPU. A run with 360 labels of drug-like molecules, and random choice for comparison, takes
8 CPU-minutes with a smaller model: docs/results/label_budget.md.
"""

import ml_collections

from mlip_jax.defaults import active_learning_defaults


def get_config() -> ml_collections.ConfigDict:
    c = active_learning_defaults()
    c.model.name = "painn"
    c.model.options = ml_collections.ConfigDict(
        dict(num_features=64, num_layers=2, cutoff=5.0, cutoff_fn="phys", num_radial=20)
    )
    # absolute errors of the total energy and of the forces, as in configs/spice.py
    c.loss.penalty, c.loss.energy_per_atom = "mae", False
    c.loss.beta, c.loss.beta_end = 0.95, 0.9

    c.optimizer.name = "muon"
    c.optimizer.learning_rate, c.optimizer.learning_rate_end = 2e-3, 2e-5
    c.train.num_steps = 1_000
    c.train.batch_size = 8
    c.train.ema_decay = 0.99
    return c


def sweep() -> list[dict]:
    """Return the variants that --sweep runs: what makes a structure worth a label."""
    return [
        {"name": strategy, "choose.strategy": strategy}
        for strategy in ("both", "uncertainty", "diversity", "random")
    ]
