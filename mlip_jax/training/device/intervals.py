"""Numbers of steps that depend on the length of a run, if the config sets none."""

from __future__ import annotations


def default_warmup(num_steps: int) -> int:
    """Return the number of steps of the warm-up of a run, if the config sets none."""
    return min(num_steps // 10, 200)


def default_intervals(num_steps: int) -> dict[str, int]:
    """Return the intervals of a run (steps) that apply if its config sets none."""
    intervals = {
        "log_every": (100, 100),
        "valid_every": (20, 1_000),
        "checkpoint_every": (20, 1_000),
    }
    return {
        name: min(max(num_steps // parts, 1), most) for name, (parts, most) in intervals.items()
    }
