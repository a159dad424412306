"""Molecular dynamics with output files and restarts."""

from __future__ import annotations

import logging
import time

from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.dynamics.outputs import RESTART, DynamicsOutputs, OutputError
from mlip_jax.simulation.dynamics.progress import DynamicsProgressBar
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)


def run_md(
    dynamics: MolecularDynamics, outputs: DynamicsOutputs, num_steps: int, restart_seconds: float
) -> float:
    """Run dynamics up to `num_steps`, from the restart file if there is one.

    Args:
      dynamics: Dynamics at the start.
      outputs: Output files.
      num_steps: Number of steps, including those of earlier starts.
      restart_seconds: Time between restart files; one is written at the end in any case.

    Returns:
      Duration of all starts (seconds).

    Raises:
      OutputError: If files cannot be written or read, or are of another run.
    """
    before = _resume(dynamics, outputs)
    num_left = num_steps - dynamics.step
    if num_left < 0:
        log.info("the run already has %s, more than requested", count_of(dynamics.step, "step"))
    timestep = dynamics.settings.timestep
    begin = saved = time.monotonic()
    known = dynamics.broken
    with DynamicsProgressBar(num_steps, dynamics.step, timestep) as progress:
        for thermo, frames in dynamics.stream(max(num_left, 0)):
            outputs.write(thermo, frames, timestep)
            broken = dynamics.broken
            for m in sorted(broken.keys() - known.keys()):
                name = outputs.name(m) or f"molecule {m}"
                log.warning("%s broke at step %d: %s", name, broken[m].step, broken[m].reason)
            known = broken
            progress.show(dynamics.step, thermo, len(broken))
            if time.monotonic() - saved >= restart_seconds:
                outputs.save(dynamics.snapshot(), before + time.monotonic() - begin)
                saved = time.monotonic()
    seconds = before + time.monotonic() - begin
    outputs.save(dynamics.snapshot(), seconds)
    if len(known) == len(dynamics.molecules):
        log.warning("all molecules have broken: the simulation ends")
    log.info(
        "compiled programs: %d; neighbor lists built %d times by the %s",
        dynamics.num_compiles,
        dynamics.num_lists_built,
        dynamics.lists_built_on,
    )
    return seconds


def _resume(dynamics: MolecularDynamics, outputs: DynamicsOutputs) -> float:
    """Resume from the restart file, or start; return the duration until then (seconds)."""
    stored = outputs.load()
    if stored is None:
        outputs.begin()
        return 0.0
    snapshot, seconds = stored
    try:
        dynamics.restore(snapshot)
    except ValueError as error:
        raise OutputError(f"{RESTART}: {error}. Give another --workdir.") from error
    log.info("resuming from step %d", dynamics.step)
    return seconds
