"""Measure the effect of more conformers at a fixed number of molecules.

    python -m mlip_jax.main --config=configs/diversity_ns_fixed.py --workdir=runs/ns_fixed \\
        --sweep \\
        --config.data.path=GEOM --config.diversity.ood_path=GEOM_QM9
    python -m mlip_jax.main --config=configs/diversity_report.py --workdir=runs/diversity \\
        --config.sweeps=runs/n_fixed,runs/ns_fixed

n_s = 12.5k, 25k, 50k and 100k molecules with n_c = 1, 2, 4, 8 or 16 conformers each and three
seeds are sixty runs, whose training sets are nested. Everything else is as in
diversity_n_fixed.py. n_s = 0.5k to 4k with PaiNN:

    --config=configs/diversity_ns_fixed.py:scale=0.04,model=painn
"""

import ml_collections

from mlip_jax.configs import diversity_n_fixed
from mlip_jax.configs.diversity_n_fixed import arguments, draws
from mlip_jax.sweeps import product

MOLECULES = (12_500, 25_000, 50_000, 100_000)


def get_config(text: str = "") -> ml_collections.ConfigDict:
    c = diversity_n_fixed.get_config(text)
    c.data.num_molecules = round(arguments(text)["scale"] * MOLECULES[0])
    return c


def sweep(text: str = "") -> list[dict]:
    given = arguments(text)
    conformers, seeds = draws(given)
    counts = [round(given["scale"] * count) for count in MOLECULES[: given["grid"]]]
    return [
        {"name": f"S{v['data.num_molecules']}-c{v['data.num_conformers']}-s{v['seed']}", **v}
        for v in product(
            {"data.num_molecules": counts, "data.num_conformers": conformers, "seed": seeds}
        )
    ]
