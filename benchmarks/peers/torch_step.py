"""The training step of the peers that are written in PyTorch, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import measure
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Return when the device has nothing left to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def train(
    job: dict[str, Any],
    model: torch.nn.Module,
    collate: Callable[[Sequence[measure.Molecule]], Any],
    predict: Callable[[Any], tuple[torch.Tensor, ...]],
) -> dict[str, Any]:
    """Time steps of energies, forces and Adam.

    Args:
      collate: Makes a batch on DEVICE of molecules, neighbour lists included where the model takes them.
      predict: batch -> energies, their labels, forces, their labels.
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
    """Counts what each operator does while it is active: FLOPs of matrix products and convolutions, as PyTorch
    registers them, and the bytes of all tensors read and written; views move nothing."""

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
    """FLOPs and bytes of one step."""
    with _Counter() as counter:
        step(batch)
    return {
        "flops": counter.flops,
        "bytes": counter.bytes,
        "counted_by": "operators; FLOPs of matrix products alone",
    }
