"""Relaxations with torch-sim, SchNetPack's PaiNN and torch-sim's Morse potential."""

import copy

import measure
import relaxing
import torch
import torch_sim
import torch_step
from run_relax_schnetpack import load
from torch_sim.autobatching import InFlightAutoBatcher
from torch_sim.models.interface import ModelInterface
from torch_sim.models.morse import MorseModel
from torch_sim.neighbors import torchsim_nl

DEVICE = torch.device(torch_step.DEVICE)
BOX = 200.0  # Å; torch-sim requires a cell, but the systems are not periodic


class Counted(ModelInterface):
    """Model that counts evaluated molecules and their time."""

    def __init__(self, dtype):
        super().__init__()
        self._device, self._dtype = DEVICE, dtype
        self._compute_forces, self._compute_stress = True, False
        self._memory_scales_with = "n_atoms"
        self.systems, self.clock = 0, relaxing.Clocked(self.evaluate)

    def forward(self, state, **kwargs):
        out = self.clock(state)
        self.systems += state.n_systems
        return out


class PaiNN(Counted):
    def __init__(self, job):
        super().__init__(torch.float32)
        self.net = load(job)

    def evaluate(self, state):
        pairs, _, _ = torchsim_nl(
            state.positions, state.row_vector_cell, state.pbc, measure.CUTOFF, state.system_idx
        )
        out = self.net(
            {
                "_idx": torch.zeros(state.n_systems),
                "_n_atoms": state.n_atoms_per_system,
                "_atomic_numbers": state.atomic_numbers,
                "_positions": state.positions.detach().clone(),
                "_idx_i": pairs[0],
                "_idx_j": pairs[1],
                "_offsets": torch.zeros(pairs.shape[1], 3, device=DEVICE),
                "_idx_m": state.system_idx,
            }
        )
        return {"energy": out["energy"].detach(), "forces": out["forces"].detach()}


class Morse(Counted):
    def __init__(self, job):
        super().__init__(torch.float64)
        m = relaxing.MORSE
        self.net = MorseModel(
            sigma=m["r0"],
            epsilon=m["epsilon"],
            alpha=m["alpha"],
            cutoff=m["cutoff"],
            dtype=torch.float64,
            device=DEVICE,
            compute_stress=False,
        )

    def evaluate(self, state):
        return self.net(state)


def batched(job):
    """Relax with torch-sim's minimizer job["method"] and batches of up to job["atoms"] atoms."""
    morse = job["model"] == "morse"
    molecules = relaxing.drops(job["batch"]) if morse else relaxing.starts(job)
    for atoms in molecules:
        atoms.set_cell([BOX] * 3)
    model = (Morse if morse else PaiNN)(job)
    converged = torch_sim.generate_force_convergence_fn(relaxing.FMAX)
    batcher = InFlightAutoBatcher(
        model=model, memory_scales_with="n_atoms", max_memory_scaler=job["atoms"]
    )
    model(torch_sim.initialize_state(copy.deepcopy(molecules[:1]), DEVICE, model.dtype))
    model.systems, model.clock.seconds, begin = 0, 0.0, relaxing.Begin()
    final = torch_sim.optimize(
        molecules,
        model,
        optimizer=torch_sim.Optimizer(job["method"]),
        convergence_fn=converged,
        max_steps=relaxing.MAX_STEPS,
        steps_between_swaps=5,
        autobatcher=batcher,
    )
    torch_step.wait()
    done = int((torch_sim.system_wise_max_force(final) < relaxing.FMAX).sum())
    return relaxing.result(
        begin, len(molecules), model.systems - len(molecules), done, model.clock.seconds
    )


if __name__ == "__main__":
    measure.main({"batched": batched}, ("torch-sim-atomistic", "schnetpack", "torch"))
