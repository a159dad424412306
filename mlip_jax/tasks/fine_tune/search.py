"""Search for the best recipe in two rounds, and the training runs of the learning curve.

Each candidate is a training run in a folder of its own, which the next round continues. The journal
has the validation errors of all finished rounds, so a stopped search resumes where it was.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mlip_jax import defaults
from mlip_jax.checkpoint import CheckpointError
from mlip_jax.datasets.columns import Columns
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.importers.parameters import describe
from mlip_jax.potential import Potential
from mlip_jax.reports.html_page import duration
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.tasks import train
from mlip_jax.tasks.fine_tune import recipes
from mlip_jax.tasks.fine_tune.labels import NewDomain, TrainingFile, with_reference
from mlip_jax.tasks.fine_tune.old_domain import OldDomain, separate_probe
from mlip_jax.tasks.fine_tune.recipes import Candidate
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.workdir import write_json

log = logging.getLogger(__name__)

JOURNAL = "search.json"
ENERGY, FORCE = "energy_mae_mev_per_atom", "force_mae_mev_per_ang"


def errors(columns: Columns, energy: np.ndarray, forces: np.ndarray) -> dict[str, float | None]:
    """Return the mean absolute errors of predictions: None without labels, NaN if one is not finite.

    Args:
      columns: S structures with A atoms and their labels.
      energy: Predicted total energies (eV), (S,).
      forces: Predicted forces (eV/Å), (A, 3).

    Returns:
      energy_mae_mev_per_atom and force_mae_mev_per_ang.
    """
    found = {
        ENERGY: (np.abs(energy - columns.energy) / columns.n_atoms, np.isfinite(columns.energy)),
        FORCE: (np.abs(forces - columns.forces), np.isfinite(columns.forces)),
    }
    return {
        name: 1e3 * float(e[known].mean()) if known.any() else None
        for name, (e, known) in found.items()
    }


class SearchJournal:
    """Results of the finished rounds, on disk after each of them.

    Attributes:
      content: {"seconds": time of all trainings (s), "runs": {folder: {steps: result}}}. A result
        has the errors in "valid", "test" and "probe", or the reason in "failure".
    """

    def __init__(self, path: Path):
        self._path = path
        self.content: dict[str, Any] = {"seconds": 0.0, "runs": {}}
        if path.exists():
            self.content = parse_json(read_bytes(path))

    @property
    def has_whole_probe(self) -> bool:
        """Whether results are of a version that chose by all structures of the probe."""
        rounds = (result for run in self.content["runs"].values() for result in run.values())
        return any("probe" in result and "probe_choice" not in result for result in rounds)

    def get(self, name: str, steps: int) -> dict[str, Any] | None:
        """Return the result of a run after a number of steps, or None."""
        return self.content["runs"].get(name, {}).get(str(steps))

    def add(self, name: str, steps: int, result: dict[str, Any]) -> None:
        """Add the result of a run after a number of steps."""
        self.content["runs"].setdefault(name, {})[str(steps)] = result
        self.content["seconds"] += result["seconds"]
        write_json(self._path, self.content)

    @property
    def steps(self) -> int:
        """Number of training steps of all runs together."""
        return sum(max(map(int, rounds)) for rounds in self.content["runs"].values())


@dataclasses.dataclass
class RecipeSearch:
    """Training runs of a fine-tuning, and the choice among them.

    Attributes:
      config: Config of task "fine_tune".
      workdir: Directory of the task.
      force_field: Initial force field as an argument of a training run.
      initial: Initial force field.
      new: Structures of the new domain.
      old: Structures of the old domain.
      files: Data of the runs by number of labels.
      probe: Structures of the old domain for the report, or None. Their labels may be those of the
        initial force field.
      probe_choice: Structures of the old domain by which `max_forgetting` chooses, of other
        molecules; None without this limit.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    force_field: str
    initial: Potential
    new: NewDomain
    old: OldDomain
    files: dict[int, TrainingFile]

    def __post_init__(self):
        self.journal = SearchJournal(self.workdir / JOURNAL)
        self.rejected: dict[str, str] = {}
        self.total_steps = 0
        self.out_of_time = False
        self.probe, self.probe_choice = self.old.probe, None
        limited = self.config.max_forgetting is not None and not self.journal.has_whole_probe
        if self.probe is not None and limited:
            rows = separate_probe(self.probe.molecule, self.config.seed, parts=2)
            self.probe_choice, self.probe = (self.probe.take(np.sort(r)) for r in rows)

    @property
    def metric(self) -> str:
        """Error that decides between the candidates."""
        return FORCE if self.new.has_forces else ENERGY

    def candidates(self) -> list[Candidate]:
        """Return the usable candidates; the reasons against the others are in `rejected`."""
        usable = []
        for candidate in recipes.candidates(self.config):
            reason = recipes.unsuitable(
                candidate.recipe,
                self.initial.params,
                self.new.new_elements,
                self.old.replay is not None,
            )
            if reason:
                self.rejected[candidate.recipe] = reason
            else:
                usable.append(candidate)
        for recipe, reason in self.rejected.items():
            log.warning("recipe %s is skipped: %s", recipe, reason)
        return usable

    def run(self, candidates: list[Candidate], num_curve: int) -> list[tuple[Candidate, dict]]:
        """Train the candidates in rounds, and return those of the last round, the best one first.

        Args:
          candidates: All candidates.
          num_curve: Number of trainings of the learning curve that follow, for the remaining time.

        Raises:
          TrainingError: All candidates failed.
        """
        num_steps, num_labels = self.config.num_steps, max(self.files)
        self.total_steps = recipes.total_steps(len(candidates), num_steps) + num_curve * num_steps
        left, ranked = candidates, []
        for steps, count in recipes.rounds(len(candidates), num_steps):
            left = recipes.survivors(left, count)
            results = [(c, self.train(c, num_labels, steps)) for c in left]
            finished = [(c, r) for c, r in results if r is not None and "failure" not in r]
            if not finished and not self.out_of_time:
                reasons = "; ".join(f"{c.name}: {r['failure']}" for c, r in results if r)
                raise TrainingError(f"fine-tuning: all candidates failed: {reasons}")
            if self.out_of_time and ranked and len(finished) < len(left):
                # the choice is among the candidates of the last complete round
                latest = [(c, self.latest(c, num_labels)) for c, _ in ranked]
                return self._rank([(c, r) for c, r in latest if "failure" not in r])
            ranked = self._rank(finished)
            left = [c for c, _ in ranked]
            for c, r in ranked:
                log.info("%s, %d steps: %s", c.name, steps, errors_text(r["valid"]))
        return ranked

    def train(self, candidate: Candidate, num_labels: int, steps: int) -> dict[str, Any] | None:
        """Train a candidate up to a number of steps, and return its errors.

        Return None if there is no time left. Finished trainings are read from the journal.
        """
        name = self.folder(candidate, num_labels)
        if (known := self.journal.get(name, steps)) is not None:
            return known
        if self._time_is_over():
            return None
        self._log_progress(name, steps)
        start = time.monotonic()
        result: dict[str, Any] = {"steps": steps}
        try:
            fit(self.train_config(candidate, num_labels, steps), self.workdir / name)
            potential = Potential.load(self.workdir / name)
        except (TrainingError, CheckpointError) as error:
            log.warning("%s failed: %s", name, error)
            result["failure"] = str(error)
        else:
            errors_of = self.evaluate(potential)
            if np.isfinite(errors_of["valid"][self.metric]):
                result |= errors_of
            else:
                result["failure"] = "its predictions of validation structures are not finite"
                log.warning("%s failed: %s", name, result["failure"])
        result["seconds"] = time.monotonic() - start
        self.journal.add(name, steps, result)
        return result

    def _rank(self, results: list[tuple[Candidate, dict]]) -> list[tuple[Candidate, dict]]:
        """Return candidates and results with ascending validation errors."""
        return sorted(results, key=lambda item: item[1]["valid"][self.metric])

    def latest(self, candidate: Candidate, num_labels: int) -> dict[str, Any]:
        """Return the result of a candidate after its last training."""
        rounds = self.journal.content["runs"][self.folder(candidate, num_labels)]
        return rounds[max(rounds, key=int)]

    def evaluate(self, potential: Potential) -> dict[str, dict[str, float | None]]:
        """Return the errors in the new domain ("valid", "test") and in the old one.

        Those of the old domain are "probe", and "probe_choice" if `max_forgetting` is set.

        In the old domain, the force field has the reference energies of the initial one.
        """
        parts = {"valid": self.new.splits["valid"], "test": self.new.splits["test"]}
        old = {"probe": self.probe, "probe_choice": self.probe_choice}
        parts |= {name: part for name, part in old.items() if part is not None and len(part)}
        # all structures together, so that one program is compiled for one batch shape
        columns = Columns.concatenate(list(parts.values()))
        energy, forces = energies_and_forces(potential, columns, np.arange(len(columns)))
        found = {name: {ENERGY: None, FORCE: None} for name in ("valid", "test", *old)}
        first, first_atom = 0, 0
        for name, part in parts.items():
            rows = slice(first, first + len(part))
            atoms = slice(first_atom, first_atom + len(part.numbers))
            first, first_atom = rows.stop, atoms.stop
            expected = part
            if name in old:
                expected = with_reference(
                    part, self.initial.reference_energies, potential.reference_energies
                )
            found[name] = errors(expected, energy[rows], forces[atoms])
        return found

    def refitted(self) -> Potential:
        """Return the initial force field with the reference energies of the new domain."""
        elements = {*self.initial.elements, *np.unique(self.new.splits["train"].numbers).tolist()}
        return dataclasses.replace(
            self.initial,
            elements=tuple(sorted(elements)),
            reference_energies=self.files[max(self.files)].reference,
        )

    def folder(self, candidate: Candidate, num_labels: int) -> str:
        """Return the path of the run of a candidate within the workdir."""
        if num_labels == max(self.files):
            return f"runs/{candidate.name}"
        return f"curve/{num_labels}_{candidate.name}"

    def train_config(
        self, candidate: Candidate, num_labels: int, steps: int
    ) -> ml_collections.ConfigDict:
        """Return the config of the training run of a candidate."""
        c, own = defaults.train_defaults(), self.config
        file = self.files[num_labels]
        c.data.update(file.fields(candidate.replays, self.new.level_of_theory))
        c.data.elements = c.data.charge = None
        c.init.workdir, c.model.name = self.force_field, ""
        for term, options in describe(self.initial.model)["terms"].items():
            c.potential[term] = True
            c.potential[f"{term}_options"] = ml_collections.ConfigDict(options)
        c.loss.update(own.loss)
        c.optimizer.update(recipes.optimizer_fields(candidate, own, self.initial.params))
        c.seed, c.train.num_steps, c.train.batch_size = own.seed, steps, own.batch_size
        c.train.ema_decay = own.ema_decay
        c.train.log_every = c.train.checkpoint_every = max(own.num_steps // 4, 1)
        c.train.valid_every = max(own.num_steps // 12, 1)
        return c

    def _time_is_over(self) -> bool:
        limit = self.config.max_minutes
        if limit is not None and self.journal.content["seconds"] > 60 * limit:
            if not self.out_of_time:
                log.warning("max_minutes is over: no further training starts")
            self.out_of_time = True
        return self.out_of_time

    def _log_progress(self, name: str, steps: int) -> None:
        """Log the finished fraction of all steps, and the remaining time."""
        done, seconds = self.journal.steps, self.journal.content["seconds"]
        left = f"about {duration(seconds / done * (self.total_steps - done))} left" if done else ""
        share = done / max(self.total_steps, 1)
        bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
        log.info(
            "fine-tuning %s %.0f %%  %s up to step %d  %s", bar, 100 * share, name, steps, left
        )


def fit(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Run or resume a training without its report."""
    with train.prepared(config, workdir) as training:
        train.fit(training)


def forgetting(before: dict[str, float | None], after: dict[str, float | None]) -> float | None:
    """Return the relative increase of the error in the old domain: of forces, or else energies.

    None if there are no labels, or if they are the predictions of the initial force field.
    """
    for name in (FORCE, ENERGY):
        if before.get(name) and after.get(name) is not None:
            return after[name] / before[name] - 1.0
    return None


def decisive_errors(errors: dict[str, Any]) -> dict[str, float | None]:
    """Return the errors in the old domain by which `max_forgetting` chooses."""
    separate = errors.get("probe_choice", {})
    return separate if any(v is not None for v in separate.values()) else errors["probe"]


def choose(
    ranked: list[tuple[Candidate, dict]],
    before: dict[str, float | None],
    max_forgetting: float | None,
) -> tuple[Candidate, dict]:
    """Return the best candidate that forgets at most `max_forgetting`.

    If none does, return the one that forgets least. The structures of "probe_choice" decide, so that
    those of "probe" show the forgetting of a force field that they have not chosen; those of "probe"
    only decide if older results have no others.

    Args:
      ranked: Candidates and results with ascending validation errors.
      before: Errors of the initial force field for the structures of "probe_choice".
      max_forgetting: Maximum relative increase of the error; None for no limit.
    """
    if max_forgetting is None:
        return ranked[0]
    lost = [forgetting(before, decisive_errors(result)) for _, result in ranked]
    known = [(f, item) for f, item in zip(lost, ranked) if f is not None]
    if not known:
        log.warning("max_forgetting has no effect: no structures of the old domain have labels")
        return ranked[0]
    for value, item in known:
        if value <= max_forgetting:
            return item
    log.warning("all candidates of the last round forget more than max_forgetting")
    return min(known, key=lambda pair: pair[0])[1]


def errors_text(found: dict[str, float | None]) -> str:
    """Return errors as text: "1.2 meV/atom, 34 meV/Å"."""
    units = ((ENERGY, "meV/atom"), (FORCE, "meV/Å"))
    return ", ".join(f"{found[n]:.3g} {u}" for n, u in units if found.get(n) is not None)
