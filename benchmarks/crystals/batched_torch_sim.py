"""Relax the first crystals with torch-sim and SevenNet-0: `batched_torch_sim.py FILE.json NUMBER RESULTS`.

Runs with torch-sim-atomistic 0.6.2 and sevenn 0.13.0 (Python 3.12): BFGS and Frechet cell filter, all
structures in one batch, converged ones are removed every 5 steps.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch_sim
from original import FMAX, MAX_STEPS, read
from sevenn.torchsim import SevenNetModel


def main(path: Path, number: int, results: Path) -> None:
    torch.set_num_threads(1)
    structures = read(path)[:number]
    names = [atoms.info["name"] for atoms in structures]
    for atoms in structures:
        atoms.info = {}
    model = SevenNetModel("7net-0", device="cpu")
    model(torch_sim.initialize_state(structures[:1], model.device, model.dtype))
    begin = time.process_time()
    final = torch_sim.optimize(
        structures,
        model,
        optimizer=torch_sim.Optimizer.bfgs,
        convergence_fn=torch_sim.generate_force_convergence_fn(FMAX, include_cell_forces=True),
        max_steps=MAX_STEPS,
        init_kwargs={"cell_filter": torch_sim.CellFilter.frechet},
    )
    seconds = time.process_time() - begin
    lines = [{"name": n, "energy": float(e)} for n, e in zip(names, final.energy)]
    lines.append({"name": "all", "structures": len(structures), "cpu_s": seconds})
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(lines[-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
