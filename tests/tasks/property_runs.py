"""Runs of the task `property` on a small data set with artificial gaps, for the tests."""

import numpy as np
from ase.build import molecule

from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.defaults import property_defaults
from mlip_jax.predictor import backbone_of
from tests.datasets.readers.samples import pubchemqcr
from tests.simulation.conftest import random_potential

# ASE's molecules of H, C, N and O, and SMILES with as many atoms; the properties are artificial.
NAMES = {
    "CH4": "C",
    "CH3OH": "CO",
    "CH3CH2OH": "CCO",
    "C2H6": "CC",
    "C2H4": "C=C",
    "C2H2": "C#C",
    "NH3": "N",
    "H2O": "O",
    "CO2": "O=C=O",
    "HCN": "C#N",
    "H2CO": "C=O",
    "HCOOH": "OC=O",
    "CH3CHO": "CC=O",
    "CH3COOH": "CC(=O)O",
    "H3CNH2": "CN",
    "CH3CN": "CC#N",
    "C3H8": "CCC",
    "CH3OCH3": "COC",
    "C6H6": "c1ccccc1",
    "C4H4O": "c1ccoc1",
    "C4H4NH": "c1cc[nH]c1",
    "C5H5N": "c1ccncc1",
    "H2O2": "OO",
    "N2H4": "NN",
}
MODEL = {"num_features": 8, "num_layers": 1, "num_radial": 8, "cutoff": 4.0}
_STIFF = 0.02  # hartree/bohr² of every coordinate


def _snapshot(atoms, positions):
    moved = positions - atoms.positions
    named = [
        {"atom": s, "charge": float(z)} for s, z in zip(atoms.get_chemical_symbols(), atoms.numbers)
    ]
    gradient = _STIFF * moved / 0.529177
    return {
        "coordinates": [a | dict(zip("xyz", map(float, x))) for a, x in zip(named, positions)],
        "energy": -float(atoms.numbers.sum())
        + 0.5 * _STIFF * float((moved**2).sum()) / 0.529177**2,
        "gradient": [
            a | dict(zip(("dx", "dy", "dz"), map(float, g))) for a, g in zip(named, gradient)
        ],
    }


def write_data(folder):
    """Write trajectories.lmdb and summary.csv, with four snapshots per molecule in two stages."""
    stored, lines = {}, ["cid,smiles,n_atoms,homo_ev,lumo_ev,gap_ev,dipole_e_bohr"]
    for number, (name, smiles) in enumerate(NAMES.items(), 1):
        atoms, rng = molecule(name), np.random.default_rng(number)
        away = rng.normal(0, 0.15, atoms.positions.shape)
        frames = [
            _snapshot(atoms, atoms.positions + share * away) for share in (1.0, 0.6, 0.3, 0.0)
        ]
        stored[f"{number:09d}".encode()] = {
            "pm3": frames[:2],
            "hf": [],
            "DFT_1st": frames[2:],
            "DFT_2nd": [],
        }
        gap = 4 + 0.2 * (atoms.numbers == 1).sum() - 0.1 * len(atoms)
        lines.append(f"{number},{smiles},{len(atoms)},-9.0,{gap - 9:.4f},{gap:.4f},0.5")
    (folder / "summary.csv").write_text("\n".join(lines) + "\n")
    return pubchemqcr.write(folder / "trajectories.lmdb", stored)


def config(folder, **changes):
    """Return the config of a small run on the data in `folder`; changes have __ for dots."""
    c = property_defaults()
    c.data.path, c.data.directory = str(folder / "trajectories.lmdb"), str(folder)
    c.data.reader_options = "stages=('pm3','DFT_1st'); level_of_theory=made up"
    c.data.reject_invalid = False
    c.data.num_train, c.data.num_valid, c.data.num_test = 0.5, 0.25, 0.25
    c.property.targets = ("gap",)
    c.model.name = "painn"
    c.model.options.update(MODEL)
    c.optimizer.warmup_steps, c.optimizer.learning_rate = 2, 5e-3
    c.train.num_steps, c.train.batch_size, c.train.ema_decay = 24, 4, 0.5
    c.train.log_every, c.train.valid_every, c.train.checkpoint_every = 6, 12, 12
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c


def write_force_field(workdir, seed=0, name="schnet", energy_scale=1.0, **options):
    """Write the workdir of a force field with random parameters for H, C, N and O.

    SchNet compiles fastest.
    """
    import jax

    model = {"name": name, "options": {**MODEL, **options}}
    from mlip_jax.potential import example_graph

    backbone = backbone_of({"model": model})
    shapes, rng = (
        jax.eval_shape(backbone.init, jax.random.key(0), example_graph()),
        np.random.default_rng(seed),
    )
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), shapes)
    store = CheckpointStore(workdir / "best")
    store.save(
        3,
        {"params": params},
        {
            "config": {"task": "train", "model": model, "potential": {}},
            "statistics": {
                "cutoff": backbone.cutoff,
                "reference_energies": [0.0] * 119,
                "energy_scale": energy_scale,
                "elements": [1, 6, 7, 8],
            },
            "versions": {},
        },
    )
    store.close()
    return params


__all__ = ["MODEL", "NAMES", "config", "random_potential", "write_data", "write_force_field"]
