"""Relaxations with SchNetPack's PaiNN and ASE; part `weights` trains the weights for all."""

import measure
import numpy as np
import relaxing
import run_schnetpack
import torch
import torch_step


def weights(job):
    """Train for job["batches"] batches and write the state dict as .npz, which mlip_jax imports."""
    model = run_schnetpack.make_model(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=measure.LEARNING_RATE)
    errors = []
    for group in measure.batches(job):
        batch = run_schnetpack.collate(group)
        out = model(dict(batch))
        error_f = out["forces"] - batch["label_forces"]
        loss = measure.ENERGY_WEIGHT * torch.mean(
            (out["energy"] - batch["label_energy"]) ** 2
        ) + measure.FORCE_WEIGHT * torch.mean(error_f**2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(error_f.detach().abs().mean()))
    np.savez(
        job["weights"],
        **{name: value.detach().cpu().numpy() for name, value in model.state_dict().items()},
    )
    return {"force_error": errors[-1], "batches": len(errors)}


def load(job) -> torch.nn.Module:
    model = run_schnetpack.make_model(job)
    with np.load(job["weights"]) as file:
        model.load_state_dict({name: torch.from_numpy(file[name]) for name in file.files})
    return model.requires_grad_(False).eval()


def ase(job):
    """Relax with one model evaluation per step, which gives energy and forces."""
    calculator = run_schnetpack.CalculatorOfModule(
        model_file=load(job),
        neighbor_list=run_schnetpack.MatScipyNeighborList(cutoff=measure.CUTOFF),
        energy_unit="eV",
        position_unit="Ang",
        device=torch_step.DEVICE,
    )
    calculate = calculator.calculate

    def both(atoms=None, properties=None, system_changes=None):
        # Always request both; otherwise ASE requests the energy in a separate call.
        calculate(atoms, ["energy", "forces"], system_changes)

    calculator.calculate = both
    return relaxing.one_by_one(relaxing.starts(job), calculator)


if __name__ == "__main__":
    measure.main({"weights": weights, "ase": ase}, ("schnetpack", "torch"))
