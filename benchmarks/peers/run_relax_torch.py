"""SchNetPack's PaiNN under ASE, and torch-sim's batched minimisers with it and with its own Morse potential.

Runs in the environment "ts". Part `weights` trains the PaiNN a little and writes what all others relax with.
"""

import copy

import measure
import numpy as np
import relaxing
import run_schnetpack
import torch
import torch_sim
import torch_step
from torch_sim.autobatching import InFlightAutoBatcher
from torch_sim.models.interface import ModelInterface
from torch_sim.models.morse import MorseModel
from torch_sim.neighbors import torch_nl_linked_cell

DEVICE = torch.device(torch_step.DEVICE)
BOX = 200.0  # Å: the library wants a cell; nothing is periodic


def weights(job):
    """Train for job["steps"] batches and write the state dict as .npz, which mlip_jax imports."""
    model = run_schnetpack.make_model(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=measure.LEARNING_RATE)
    errors = []
    for group in measure.batches(job):
        batch = run_schnetpack.collate(group)
        out = model(dict(batch))
        error_f = out["forces"] - batch["label_forces"]
        loss = (measure.ENERGY_WEIGHT * torch.mean((out["energy"] - batch["label_energy"]) ** 2)
                + measure.FORCE_WEIGHT * torch.mean(error_f ** 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(error_f.detach().abs().mean()))
    np.savez(job["weights"], **{name: value.detach().cpu().numpy() for name, value in model.state_dict().items()})
    return {"force_error": errors[-1], "batches": len(errors)}


def load(job) -> torch.nn.Module:
    model = run_schnetpack.make_model(job)
    with np.load(job["weights"]) as file:
        model.load_state_dict({name: torch.from_numpy(file[name]) for name in file.files})
    return model.requires_grad_(False).eval()


def ase(job):
    """One model call a step: SchNetPack's calculator answers energy and forces from one evaluation."""
    calculator = run_schnetpack.CalculatorOfModule(
        model_file=load(job), neighbor_list=run_schnetpack.MatScipyNeighborList(cutoff=measure.CUTOFF),
        energy_unit="eV", position_unit="Ang", device=torch_step.DEVICE)
    calculate = calculator.calculate

    def both(atoms=None, properties=None, system_changes=None):
        # asked for forces alone it leaves the energy out, and ASE asks for it in a call of its own
        calculate(atoms, ["energy", "forces"], system_changes)

    calculator.calculate = both
    return relaxing.one_by_one(relaxing.starts(job), calculator)


class Counted(ModelInterface):
    """Counts molecules evaluated and the time that it takes."""

    def __init__(self, dtype):
        super().__init__()
        self._device, self._dtype = DEVICE, dtype
        self._compute_forces, self._compute_stress = True, False
        self._memory_scales_with = "n_atoms"
        self.systems, self.clock = 0, relaxing.Clocked(self.evaluate)

    def forward(self, state, **kwargs):
        out = self.clock(state if hasattr(state, "system_idx") else torch_sim.SimState(**state))
        self.systems += len(out["energy"])
        return out


class PaiNN(Counted):
    def __init__(self, job):
        super().__init__(torch.float32)
        self.net = load(job)

    def evaluate(self, state):
        cells = state.cell.mT.reshape(-1, 3)
        periodic = torch.zeros((state.n_systems, 3), dtype=torch.bool, device=DEVICE)
        pairs, _, _ = torch_nl_linked_cell(measure.CUTOFF, state.positions, cells, periodic, state.system_idx)
        out = self.net({
            "_idx": torch.zeros(state.n_systems), "_n_atoms": torch.bincount(state.system_idx),
            "_atomic_numbers": state.atomic_numbers.long(), "_positions": state.positions.detach().clone(),
            "_idx_i": pairs[0], "_idx_j": pairs[1], "_offsets": torch.zeros(pairs.shape[1], 3, device=DEVICE),
            "_idx_m": state.system_idx})
        return {"energy": out["energy"].detach(), "forces": out["forces"].detach()}


class Morse(Counted):
    def __init__(self, job):
        super().__init__(torch.float64)
        m = relaxing.MORSE
        self.net = MorseModel(sigma=m["r0"], epsilon=m["epsilon"], alpha=m["alpha"], cutoff=m["cutoff"],
                              dtype=torch.float64, device=DEVICE, compute_forces=True)

    def evaluate(self, state):
        return self.net(state)


def batched(job):
    """torch-sim's minimiser job["method"]; atoms of a batch as its in-flight batcher is told."""
    morse = job["model"] == "morse"
    molecules = relaxing.drops(job["batch"]) if morse else relaxing.starts(job)
    for atoms in molecules:
        atoms.set_cell([BOX] * 3)
    model = (Morse if morse else PaiNN)(job)
    method = getattr(torch_sim.optimizers, job["method"], None)
    if method is None:
        raise ValueError(f"this version of torch-sim has no {job['method']}")
    converged = torch_sim.generate_force_convergence_fn(relaxing.FMAX, include_cell_forces=False)
    batcher = InFlightAutoBatcher(model=model, memory_scales_with="n_atoms", max_memory_scaler=job["atoms"])
    model(torch_sim.initialize_state(copy.deepcopy(molecules[:1]), DEVICE, model.dtype))
    model.systems, model.clock.seconds, begin = 0, 0.0, relaxing.Begin()
    final = torch_sim.optimize(molecules, model, optimizer=method, convergence_fn=converged,
                               max_steps=relaxing.MAX_STEPS, steps_between_swaps=5, autobatcher=batcher)
    torch_step.wait()
    done = int(converged(final).sum())
    return relaxing.result(begin, len(molecules), model.systems - len(molecules), done, model.clock.seconds)


if __name__ == "__main__":
    measure.main({"weights": weights, "ase": ase, "batched": batched}, ("schnetpack", "torch", "torch-sim-atomistic"))
