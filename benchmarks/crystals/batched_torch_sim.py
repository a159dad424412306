"""Relax crystals with torch-sim and SevenNet-0 for a fixed number of steps, for comparison with ours.py.

    taskset -c 0 python batched_torch_sim.py FOLDER/crystals.json RESULTS.jsonl --names=Cu,Al --steps=15

Runs with torch-sim and sevenn: BFGS and Frechet cell filter, all structures in one batch, without a
test of convergence. Each line has a structure; the last one has the processor time and the number of
evaluations of the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import torch
import torch_sim
from original import named, read
from sevenn.torchsim import SevenNetModel

# _SWAP_EVERY: steps between two calls of the test of convergence.
_SWAP_EVERY = 5


def never_converged(state, last_energy) -> torch.Tensor:
    """Return that no structure has converged."""
    return torch.zeros(state.n_systems, dtype=torch.bool, device=state.device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("structures", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--names", help="relax only these structures, separated by commas")
    parser.add_argument("--steps", type=int, default=15, help=f"a multiple of {_SWAP_EVERY}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    structures = named(read(arguments.structures), arguments.names)
    names = [atoms.info["name"] for atoms in structures]
    for atoms in structures:
        atoms.info = {}
    model = SevenNetModel("7net-0", device="cpu")
    model(torch_sim.initialize_state(structures, model.device, model.dtype))  # not timed
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    begin = time.process_time()
    final = torch_sim.optimize(
        structures,
        model,
        optimizer=torch_sim.Optimizer.bfgs,
        convergence_fn=never_converged,
        max_steps=arguments.steps,
        steps_between_swaps=_SWAP_EVERY,
        init_kwargs={"cell_filter": torch_sim.CellFilter.frechet},
    )
    total = {"name": "all", "cpu_s": time.process_time() - begin, "evaluations": len(calls)}
    lines = [
        {
            "name": name,
            "energy": float(energy),
            "atoms": len(atoms),
            "volume": float(volume),
            "volume_start": atoms.get_volume(),
        }
        for name, energy, volume, atoms in zip(names, final.energy, final.volume, structures)
    ]
    arguments.results.write_text("".join(json.dumps(line) + "\n" for line in [*lines, total]))
    for line in [*lines, total]:
        print(line)


if __name__ == "__main__":
    main()
