"""Train a MACE of mace-torch on alloys of ASE's EMT: `python train_mace.py FOLDER` with mace-torch 0.3.16.

Writes alloys.json (20 alloys, away from their minima, which are not in the training set) and
alloys.model. The training takes a few minutes on one core. The model is realistic in size; its
accuracy has no effect on the comparison of programs.
"""

import os

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.data import atomic_numbers
from ase.db import connect
from e3nn.o3 import Irreps
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.modules import RealAgnosticResidualInteractionBlock, ScaleShiftMACE, gate_dict
from mace.tools import AtomicNumberTable
from mace.tools.torch_geometric.dataloader import DataLoader

CONSTANTS = {"Al": 4.05, "Cu": 3.61, "Ag": 4.09, "Au": 4.08, "Ni": 3.52, "Pd": 3.89, "Pt": 3.92}
ELEMENTS = AtomicNumberTable(sorted(atomic_numbers[symbol] for symbol in CONSTANTS))
LABELS = KeySpecification(info_keys={"energy": "label"}, arrays_keys={"forces": "label"})
CUTOFF, NUM_TRAINING, BATCH, EPOCHS = 4.5, 240, 8, 6


def alloy(rng, atoms: int, rattle: float, strain: float):
    """Return a random fcc alloy of 4 or 8 atoms."""
    symbols = rng.choice(list(CONSTANTS), 2, replace=False)
    chosen = rng.choice(symbols, atoms)
    constant = np.mean([CONSTANTS[symbol] for symbol in chosen])
    found = bulk("Cu", a=constant, cubic=True) * (atoms // 4, 1, 1)
    found.set_chemical_symbols(list(chosen))
    found.positions += rng.normal(0.0, rattle, found.positions.shape)
    deformation = rng.normal(0.0, strain, (3, 3))
    symmetric = np.eye(3) * (1 + rng.normal(0.0, strain)) + (deformation + deformation.T) / 2
    found.set_cell(found.cell.array @ symmetric, scale_atoms=True)
    return found


def training_set(rng) -> list:
    """Return graphs with the energies and forces of EMT."""
    graphs = []
    for _ in range(NUM_TRAINING):
        atoms = alloy(rng, int(rng.choice([4, 8])), 0.15, 0.04)
        atoms.calc = EMT()
        atoms.info["label"] = atoms.get_potential_energy()
        atoms.arrays["label"] = atoms.get_forces()
        atoms.calc = None
        config = config_from_atoms(atoms, key_specification=LABELS)
        graphs.append(AtomicData.from_config(config, z_table=ELEMENTS, cutoff=CUTOFF))
    return graphs


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    loader = DataLoader(training_set(rng), batch_size=BATCH, shuffle=True, drop_last=True)
    model = ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=RealAgnosticResidualInteractionBlock,
        interaction_cls_first=RealAgnosticResidualInteractionBlock,
        num_interactions=2,
        num_elements=len(ELEMENTS),
        hidden_irreps=Irreps("64x0e+64x1o"),
        MLP_irreps=Irreps("16x0e"),
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=30.0,
        atomic_numbers=ELEMENTS.zs,
        correlation=3,
        gate=gate_dict["silu"],
        use_reduced_cg=False,
        atomic_inter_scale=0.5,
        atomic_inter_shift=0.2,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, amsgrad=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.6)
    for epoch in range(EPOCHS):
        errors = []
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch.to_dict(), training=True)
            count = (batch.ptr[1:] - batch.ptr[:-1]).to(batch.energy.dtype)
            energy, force = (out["energy"] - batch.energy) / count, out["forces"] - batch.forces
            (10 * (energy**2).mean() + (force**2).mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            errors.append([energy.abs().mean().item(), force.abs().mean().item()])
        schedule.step()
        error = np.mean(errors, axis=0)
        print(
            f"epoch {epoch}: {1e3 * error[0]:.0f} meV/atom, {1e3 * error[1]:.0f} meV/Å", flush=True
        )
    torch.save(model, folder / "alloys.model")
    (folder / "alloys.json").unlink(missing_ok=True)
    for number in range(20):
        atoms = alloy(rng, 8 if number % 2 else 4, 0.08, 0.02)
        name = f"{number} {atoms.get_chemical_formula()}"
        connect(folder / "alloys.json").write(atoms, data={"name": name, "kind": "metal"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
