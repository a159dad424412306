"""Task `fine_tune`: fine-tune a force field by the best of several recipes, and write a report.

1. Load the initial force field and the labeled structures, and refit the reference energies.
2. Load or generate structures of the old domain: for replay, and for the test of forgetting.
3. Train all candidates in rounds, dropping those with the larger validation errors.
4. Write the report of the chosen run, with its domain, and make it the result of this workdir.
5. Train the chosen recipe on fewer labels for the learning curve.
6. Propose structures to label next, and write metrics.json and report.html.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from ase.data import chemical_symbols

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.files import make_subfolder, write_joined
from mlip_jax.importers import load_force_field, parameters, split_force_fields
from mlip_jax.potential import BEST, Potential
from mlip_jax.reports import fine_tuning as report
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import FILE as DOMAIN_FILE
from mlip_jax.tasks import train
from mlip_jax.tasks.fine_tune import next_structures, old_domain, search
from mlip_jax.tasks.fine_tune.expected_error import expected_error
from mlip_jax.tasks.fine_tune.labels import NewDomain, training_file
from mlip_jax.tasks.fine_tune.recipes import Candidate
from mlip_jax.tasks.fine_tune.search import RecipeSearch
from mlip_jax.tasks.force_field_training.repeated_warnings import repeated_warnings_once
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.workdir import atomic_path, check_origin, claimed, write_json

log = logging.getLogger(__name__)

NEXT = "next_structures.xyz"
_INITIAL = "initial"  # folder of an initial force field that is given as an object


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Fine-tune the force field of `config`; return the path of the report.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, TrainingError, Stopped, ValueError:
        The message explains how to fix the problem.
    """
    return fine_tune_config(config, workdir)


def fine_tune_config(
    config: ml_collections.ConfigDict, workdir: str | Path, force_field: Any = None
) -> Path:
    """Fine-tune a force field by `config`, or resume; return the path of the report.

    Args:
      config: Config of the task.
      workdir: Directory of the run.
      force_field: Initial force field as an object, which replaces config.force_field.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, TrainingError, Stopped, ValueError:
        The message explains how to fix the problem.
    """
    config = configs.complete(config, defaults.fine_tune_defaults())
    _check(config, force_field)
    with repeated_warnings_once(), claimed(workdir, configs.identity(config)) as workdir:
        return _run(prepare(config, workdir, force_field))


def prepare(
    config: ml_collections.ConfigDict, workdir: Path, force_field: Any = None
) -> RecipeSearch:
    """Load all data, write the files of the training runs, and return the search.

    Args:
      config: Complete config of the task.
      workdir: Directory of the run.
      force_field: See `fine_tune_config`.

    Raises:
      WorkdirError, DatasetError, CheckpointError, ValueError: The message explains how to fix the
        problem.
    """
    name, initial = _initial_force_field(config, workdir, force_field)
    new = NewDomain.load(config, initial)
    origin = {"force_field": initial.digest(), "data": new.digest}
    check_origin(workdir / "origin.json", origin, "another fine-tuning")
    old = old_domain.load(config, initial, workdir / "data")
    return _search(config, workdir, name, initial, new, old)


def _check(config: ml_collections.ConfigDict, force_field: Any) -> None:
    """Raise ConfigError if the task cannot run."""
    if not config.data.path:
        raise ConfigError("data.path is required, e.g. --config.data.path=mine.xyz")
    given = config.force_field if force_field is None else force_field
    if len(split_force_fields(given)) > 1:
        raise ConfigError(
            "fine-tuning starts from one force field, received an ensemble. Fine-tune its members "
            "in one workdir each; their workdirs, separated by commas, are an ensemble again."
        )
    if distributed.count() > 1:
        raise ConfigError(f"fine-tuning runs in one process, received {distributed.count()}")
    if not config.recipes or not config.learning_rates:
        raise ConfigError("recipes and learning_rates must not be empty")


def _initial_force_field(config, workdir: Path, given: Any) -> tuple[str, Potential]:
    """Return the initial force field, and the argument of a training run that names it."""
    if given is None or isinstance(given, str | Path):
        name = str(given or config.force_field)
        return name, load_force_field(name)
    initial = load_force_field(given)
    folder = parameters.save(initial, workdir / "data" / _INITIAL)
    return f"parameters:{folder}", initial


def _search(config, workdir: Path, name: str, initial, new, old) -> RecipeSearch:
    """Prepare the training runs: the data of all numbers of labels."""
    num_labels = len(new.splits["train"])
    numbers = []
    for n in sorted(n for n in set(config.curve) if n < num_labels):
        if new.covers_elements(n):
            numbers.append(n)
        else:
            log.warning("learning curve: %d labels do not contain all elements; left out", n)
    numbers.append(num_labels)
    files = {n: training_file(workdir / "data", new, n, initial, config.seed) for n in numbers}
    for file in files.values():
        file.write(new, old.replay, initial, config.old.share)
    return RecipeSearch(config, workdir, name, initial, new, old, files)


def _run(recipe_search: RecipeSearch) -> Path:
    """Train the candidates, choose one, and write all results."""
    config, workdir, new = recipe_search.config, recipe_search.workdir, recipe_search.new
    before = recipe_search.evaluate(recipe_search.refitted())
    fewer = [n for n in recipe_search.files if n < max(recipe_search.files)]
    candidates = recipe_search.candidates()
    if not candidates:
        reasons = "; ".join(f"{k}: {v}" for k, v in recipe_search.rejected.items())
        raise ConfigError(f"none of the recipes can be used: {reasons}")
    ranked = recipe_search.run(candidates, len(fewer))
    if not ranked:
        raise TrainingError(
            "max_minutes was over before the first candidate had finished. Increase it and rerun."
        )
    has_labels = recipe_search.old.is_labelled
    chosen, result = search.choose(
        ranked, search.decisive_errors(before) if has_labels else {}, config.max_forgetting
    )
    log.info("chosen: %s, test errors %s", chosen.name, search.errors_text(result["test"]))
    _make_result(recipe_search, chosen, result["steps"])
    curve = {0: before, max(recipe_search.files): result}
    for n in fewer:
        if (point := recipe_search.train(chosen, n, result["steps"])) and "failure" not in point:
            curve[n] = point
    potential, domain = Potential.load(workdir), atom_domain.load_domain(workdir)
    proposal = None
    if config.pool.path and domain is not None:
        proposal = next_structures.propose(config, potential, domain, new.splits["train"])
        _write_xyz(workdir / NEXT, proposal.atoms)
    metrics = report.summarize(
        recipe_search.journal.content,
        chosen={"name": chosen.name, "recipe": chosen.recipe, "rate": chosen.learning_rate},
        result=result,
        before=before,
        curve=curve,
        expected=expected_error(potential, domain, new.splits["test"], config.seed),
        forgetting=search.forgetting(before["probe"], result["probe"]) if has_labels else None,
        rejected=recipe_search.rejected,
        metric=recipe_search.metric,
        next_structures=None
        if proposal is None
        else {
            "file": NEXT,
            "num_structures": len(proposal.atoms),
            "num_pool": proposal.num_pool,
            "num_outside": proposal.num_outside,
        },
        out_of_time=recipe_search.out_of_time,
    )
    write_json(workdir / "metrics.json", metrics)
    if text := report.without_gain(metrics):
        log.warning("%s", text)
    path = report.write_report(
        workdir, metrics, notes=new.notes, info=_settings(recipe_search, potential)
    )
    log.info("report: %s", path)
    for line in report.outcome(metrics, workdir):
        log.info("%s", line)
    return path


def _make_result(recipe_search: RecipeSearch, chosen: Candidate, steps: int) -> None:
    """Write the report of the chosen run, and copy its force field to the workdir."""
    num_labels, workdir = max(recipe_search.files), recipe_search.workdir
    folder = make_subfolder(workdir / recipe_search.folder(chosen, num_labels), workdir)
    if not (folder / "report.html").exists():
        train.run(recipe_search.train_config(chosen, num_labels, steps), folder)
    _replace_folder(make_subfolder(folder / BEST), workdir / BEST)
    if (folder / DOMAIN_FILE).exists():
        write_joined(workdir / DOMAIN_FILE, [folder / DOMAIN_FILE])


def _replace_folder(source: Path, target: Path) -> None:
    """Replace a folder by a copy of another one. A killed process leaves a complete copy or none.

    Symbolic links are copied as links, because they could lead to any file of the user.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, symlinks=True)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _write_xyz(path: Path, atoms: list) -> None:
    """Write structures to an extended xyz file."""
    from ase.io import write

    with atomic_path(path) as temporary:
        write(temporary, atoms, format="extxyz")


def _settings(recipe_search: RecipeSearch, potential: Potential) -> dict[str, dict[str, Any]]:
    """Return names and values for the report."""
    config, new = recipe_search.config, recipe_search.new
    labeled = np.unique(new.splits["train"].numbers)
    return {
        "Force field": {
            "start": recipe_search.force_field,
            "digest": potential.digest(),
            "forces": potential.origin_of_forces,
        },
        "New domain": {
            "data": new.name,
            "level of theory": new.level_of_theory,
            **{f"{name} structures": len(columns) for name, columns in new.splits.items()},
            "new elements": ", ".join(new.new_elements) or "none",
            "elements without labels, whose reference energies are those of the start": ", ".join(
                chemical_symbols[z] for z in recipe_search.initial.elements if z not in labeled
            )
            or "none",
        },
        "Old domain": {
            "origin": recipe_search.old.origin,
            "structures for replay": len(recipe_search.old.replay or ()),
            "structures of the test": len(recipe_search.old.probe or ()),
        },
        "Settings": {
            f"{name}.{key}" if key else name: str(value)
            for name, part in configs.to_dict(config).items()
            if name not in ("task", "force_field", "data")
            for key, value in (part.items() if isinstance(part, dict) else [("", part)])
        },
    }
