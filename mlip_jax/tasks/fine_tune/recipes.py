"""Recipes of fine-tuning: the parameters that are trained, replay, and the learning rate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from mlip_jax.training.parameters.paths import parameter_path


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe with a learning rate.

    Attributes:
      recipe: Name of the recipe, see `defaults.fine_tuning.RECIPES`.
      learning_rate: Learning rate after the warmup.
    """

    recipe: str
    learning_rate: float

    @property
    def name(self) -> str:
        """Name of the folder of its run."""
        return f"{self.recipe}_{self.learning_rate:g}"

    @property
    def replays(self) -> bool:
        """Whether the training split contains structures of the old domain."""
        return self.recipe.endswith("_replay")


def candidates(config: ml_collections.ConfigDict) -> list[Candidate]:
    """Return all candidates of a config."""
    return [Candidate(r, float(rate)) for r in config.recipes for rate in config.learning_rates]


def early_parameters(params: Any) -> tuple[str, ...]:
    """Return the paths of the embeddings and of the first half of the layers.

    Embeddings have a component of their path with "embed". Layers are numbered in a component of
    their path, as in "update_0" or "layers_0".
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [parameter_path(path) for path, _ in leaves]
    layer = {path: _layer(path) for path in paths}
    numbers = sorted({number for number in layer.values() if number is not None})
    first = set(numbers[: len(numbers) // 2])
    chosen = [p for p in paths if "embed" in p or layer[p] in first]
    return tuple(chosen) if len(chosen) < len(paths) else ()


def _layer(path: str) -> int | None:
    """Return the number of the layer of a parameter, or None if it belongs to no numbered layer."""
    for component in path.split("/")[1:3]:  # the second one if the first is that of energy terms
        if match := re.search(r"_(\d+)(?:_|$)", component):
            return int(match[1])
    return None


def unsuitable(
    recipe: str, params: Any, new_elements: Sequence[str], has_old_structures: bool
) -> str:
    """Return the reason why a recipe cannot be used, or "".

    Args:
      recipe: Name of the recipe.
      params: Parameters of the initial force field.
      new_elements: Symbols of the elements that the initial force field was not trained on.
      has_old_structures: Whether there are structures for replay.
    """
    if new_elements and not recipe.startswith("full"):
        return (
            f"it does not train the embeddings, which the new elements {', '.join(new_elements)} "
            "require"
        )
    if recipe == "frozen" and not early_parameters(params):
        return "the parameters of this model have no embeddings or numbered layers"
    if recipe.endswith("_replay") and not has_old_structures:
        return "there are no structures of the old domain"
    return ""


def optimizer_fields(
    candidate: Candidate, config: ml_collections.ConfigDict, params: Any
) -> dict[str, Any]:
    """Return the fields of config.optimizer of a training run.

    Args:
      candidate: Recipe and learning rate.
      config: Config of task "fine_tune".
      params: Parameters of the initial force field.
    """
    fields: dict[str, Any] = {
        "name": config.optimizer,
        "learning_rate": candidate.learning_rate,
        "learning_rate_end": candidate.learning_rate / 100,
        "warmup_steps": None,
    }
    if candidate.recipe == "frozen":
        fields["freeze"] = early_parameters(params)
    if candidate.recipe.startswith("low_rank"):
        fields["low_rank"] = config.rank
    return fields


def rounds(num_candidates: int, num_steps: int) -> list[tuple[int, int]]:
    """Return (steps so far, number of candidates) of each round.

    >>> rounds(10, 1000), rounds(1, 1000)
    ([(250, 10), (1000, 2)], [(1000, 1)])
    """
    if num_candidates <= 2:
        return [(num_steps, num_candidates)]
    return [(max(num_steps // 4, 1), num_candidates), (num_steps, 2)]


def total_steps(num_candidates: int, num_steps: int) -> int:
    """Return the number of training steps of all rounds together."""
    total, before = 0, 0
    for steps, count in rounds(num_candidates, num_steps):
        total, before = total + count * (steps - before), steps
    return total


def survivors(ranked: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the candidates of the next round.

    The best one with and the best one without replay are among them, so that the last round shows
    the price of remembering the old domain.

    Args:
      ranked: Candidates with ascending validation errors.
      count: Number of candidates of the next round.
    """
    kept = list(ranked[:count])
    for replays in (True, False):
        best = next((c for c in ranked if c.replays == replays), None)
        if best is not None and best not in kept and len(kept) > 1:
            kept[-1] = best
    return kept
