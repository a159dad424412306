"""Progress of molecular dynamics: a bar on a terminal, otherwise a log line from time to time."""

from __future__ import annotations

import logging
import time
from types import TracebackType

import numpy as np
from rich import progress

from mlip_jax.simulation.dynamics.results import Thermo

log = logging.getLogger(__name__)

_LOG_SECONDS = 15.0
_SECONDS_OF_DAY = 86_400


def nanoseconds_per_day(steps_per_second: float, timestep: float) -> float:
    """Return the simulated time of each molecule per day (ns).

    Args:
      steps_per_second: Speed.
      timestep: Time step (fs).
    """
    return steps_per_second * timestep * 1e-6 * _SECONDS_OF_DAY


class DynamicsProgressBar:
    """Context manager that shows a progress bar of the steps."""

    def __init__(self, total: int, step: int, timestep: float):
        """Create a progress bar.

        Args:
          total: Total number of steps.
          step: Number of steps of earlier starts.
          timestep: Time step (fs).
        """
        self._total, self._timestep = total, timestep
        self._text, self._step, self._logged = "", step, time.monotonic()
        self._before, self._begin, self._speed = None, 0.0, ""
        self._bar = progress.Progress(
            progress.TextColumn("dynamics"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("", total=total, completed=step, text="compiling")

    def __enter__(self) -> DynamicsProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, step: int, thermo: Thermo, num_broken: int) -> None:
        """Update the bar after a dispatch.

        Args:
          step: Number of steps made.
          thermo: Energies and temperatures since the last call.
          num_broken: Number of broken molecules.
        """
        now = time.monotonic()
        if self._before is None:  # the first dispatch includes compilation
            self._before, self._begin = step, now
        elif now > self._begin:
            speed = (step - self._before) / (now - self._begin)
            self._speed = (
                f"  {speed:.4g} steps/s  {nanoseconds_per_day(speed, self._timestep):.3g} ns/day"
            )
        self._text = (
            self._last(thermo) + self._speed + (f"  {num_broken} broken" if num_broken else "")
        )
        self._bar.update(self._task, completed=step, text=self._text)
        if now - self._logged >= _LOG_SECONDS and not self._bar.console.is_terminal:
            self._logged = now
            log.info("step %d of %d: %s", step, self._total, self._text)

    def _last(self, thermo: Thermo) -> str:
        """Return mean temperature and energy of the running molecules in the last recorded step."""
        if not len(thermo.step) or np.isnan(thermo.potential[-1]).all():
            return self._text.split("  ")[0] if self._text else ""
        return f"{np.nanmean(thermo.temperature[-1]):.0f} K, {np.nanmean(thermo.total[-1]):.3f} eV"
