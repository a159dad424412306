"""Progress display of a training run: a bar on a terminal, log lines otherwise."""

from __future__ import annotations

import logging
from types import TracebackType

from rich import progress

from mlip_jax import distributed

log = logging.getLogger(__name__)


class TrainingProgressBar:
    """Context manager of the progress bar of a run.

    Args:
      total: Number of steps of the run.
      done: Number of steps done before.
    """

    def __init__(self, total: int, done: int):
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            disable=not distributed.leader(),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, text="compiling")

    def __enter__(self) -> TrainingProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, step: int, total: int, row: dict[str, float], errors: str) -> None:
        """Show the progress at `step`.

        Args:
          step: Number of steps done.
          total: Number of steps of the run.
          row: Metrics of the last steps.
          errors: Training errors, formatted.
        """
        text = f"{errors}  {row['structures_per_second']:.0f} structures/s"
        busy = "" if "mfu" not in row else f"  MFU {100 * row['mfu']:.1f} %"
        rates = (
            f"{row['atoms_per_second']:.0f} atoms/s  {row['edges_per_second']:.0f} edges/s  "
            f"waiting for input {100 * row['input_share']:.1f} %{busy}"
        )
        self._bar.update(self._task, completed=step, text=f"{text}\n{rates}")
        if not self._bar.console.is_terminal:
            log.info("step %d/%d  %s  %s", step, total, text, rates)
