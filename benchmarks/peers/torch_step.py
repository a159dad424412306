"""Training step of packages that use PyTorch, and its FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import measure
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Wait until the device has finished all work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Copy an array to DEVICE."""
    return torch.as_tensor(array, dtype=dtype, device=DEVICE)


def join(molecules: Sequence[measure.Molecule]) -> dict[str, torch.Tensor]:
    """Concatenate molecules on DEVICE. "graph" is the index of the molecule of each atom, (N,)."""
    sizes = [len(m.numbers) for m in molecules]
    return {
        "numbers": tensor(np.concatenate([m.numbers for m in molecules]), torch.long),
        "positions": tensor(np.concatenate([m.positions for m in molecules]), torch.float32),
        "graph": tensor(np.repeat(np.arange(len(sizes)), sizes), torch.long),
        "energy": tensor(np.array([m.energy for m in molecules]), torch.float32),
        "forces": tensor(np.concatenate([m.forces for m in molecules]), torch.float32),
    }


def join_edges(molecules: Sequence[measure.Molecule]) -> tuple[np.ndarray, np.ndarray]:
    """Return the receivers and senders of the edges of all molecules, (E,) each."""
    receivers, senders, offset = [], [], 0
    for molecule in molecules:
        i, j = measure.edges(molecule.positions)
        receivers.append(i + offset)
        senders.append(j + offset)
        offset += len(molecule.numbers)
    return np.concatenate(receivers), np.concatenate(senders)


def train(
    job: dict[str, Any],
    model: torch.nn.Module,
    collate: Callable[[Sequence[measure.Molecule]], Any],
    predict: Callable[[Any], tuple[torch.Tensor, ...]],
) -> dict[str, Any]:
    """Time steps of energies, forces and Adam.

    Args:
      job: Job of part train.
      model: Model to train.
      collate: Function that builds a batch on DEVICE from molecules, with neighbor lists if the
        model requires them.
      predict: Function from a batch to energies, their labels, forces and their labels.
    """
    groups = measure.batches(job)
    data = [collate(group) for group in groups]
    optimizer = torch.optim.Adam(model.parameters(), lr=measure.LEARNING_RATE)

    def step(batch):
        energy, energy_label, forces, force_label = predict(batch)
        loss = measure.ENERGY_WEIGHT * torch.mean(
            (energy - energy_label) ** 2
        ) + measure.FORCE_WEIGHT * torch.mean((forces - force_label) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    times = measure.time_steps(step, data, job["seconds"], wait, each=DEVICE == "cpu")
    peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else None
    result = measure.training_result(
        times,
        measure.real_sizes(groups),
        sum(p.numel() for p in model.parameters()),
        device=DEVICE,
        peak_device_mib=peak,
    )
    return result | (cost(step, data[0]) if job["counters"] else {})


class _Counter(TorchDispatchMode):
    """Counter of FLOPs and bytes of the operators that run while it is active.

    FLOPs are those of matrix products and convolutions, as registered by PyTorch. Bytes are those
    of all tensors read and written, except by views.
    """

    def __init__(self):
        super().__init__()
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.flops += flop_registry[function.overloadpacket](
                *args, **(kwargs or {}), out_val=out
            )
        if not function.is_view:
            self.bytes += sum(
                t.numel() * t.element_size()
                for t in tree_leaves((args, kwargs, out))
                if isinstance(t, torch.Tensor)
            )
        return out


def cost(step: Callable[[Any], None], batch: Any) -> dict[str, Any]:
    """Return the FLOPs and bytes of one step."""
    with _Counter() as counter:
        step(batch)
    return {
        "flops": counter.flops,
        "bytes": counter.bytes,
        "counted_by": "operators; only FLOPs of matrix products",
    }
