"""Optimizers, learning-rate schedules and frozen parameters, by config."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mlip_jax.config import unknown_name

OPTIMIZERS = ("adam", "amsgrad", "adamw", "muon")
SCHEDULES = ("cosine", "exponential", "step", "plateau", "constant")

_POSITIVE = (lambda x: x > 0, "a positive number")
_NOT_NEGATIVE = (lambda x: x >= 0, "zero or a positive number")
_BELOW_ONE = (lambda x: 0 <= x < 1, "at least 0 and below 1")
_FACTOR = (lambda x: 0 < x < 1, "between 0 and 1, both excluded")

_OF_ALL_RATES = {"learning_rate": _POSITIVE, "learning_rate_end": _NOT_NEGATIVE, "warmup_steps": _NOT_NEGATIVE}
_OF_SCHEDULE = {
    "exponential": {"learning_rate_end": (lambda x: x > 0, "a positive number, for an exponential never reaches zero")},
    "step": {"decay_factor": _FACTOR, "decay_epochs": _POSITIVE},
    "plateau": {"decay_factor": _FACTOR, "plateau_patience": _NOT_NEGATIVE, "plateau_threshold": _BELOW_ONE},
}
_OF_ALL_RULES = {"b1": _BELOW_ONE, "b2": _BELOW_ONE, "eps": _POSITIVE}


def learning_rate(config: Mapping[str, Any], num_steps: int, steps_per_epoch: float = 1.0
                  ) -> Callable[[Any], jax.Array]:
    """`step -> learning rate`: linear warm-up to `learning_rate`, then what `schedule` says.

        cosine, exponential   down to learning_rate_end at the last step
        step                  times decay_factor every decay_epochs (rounded to whole steps, counted from the first
                              step of the run), never below learning_rate_end
        plateau, constant     as it is; `Plateau` gives the factor that validation sets

    Args:
      config: The part "optimizer".
      num_steps: Of the run.
      steps_per_epoch: Updates that one pass over the training set takes; "step" uses it.

    Raises:
      ValueError: No such schedule, or a value out of its range.
    """
    schedule = config["schedule"]
    if schedule not in SCHEDULES:
        raise ValueError(unknown_name("optimizer.schedule", schedule, SCHEDULES))
    _check_rates(config, steps_per_epoch)
    peak, end = float(config["learning_rate"]), float(config["learning_rate_end"])
    warmup = min(int(config["warmup_steps"]), max(num_steps - 1, 0))
    rest = max(num_steps - warmup, 1)
    if schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, end / peak)
    elif schedule == "exponential":
        decay = optax.exponential_decay(peak, rest, end / peak, end_value=end)
    elif schedule == "step":
        period = max(round(config["decay_epochs"] * steps_per_epoch), 1)
        decay = _staircase(peak, end, float(config["decay_factor"]), period, warmup)
    else:
        decay = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), decay], [warmup])


def _staircase(peak, end, factor, period, warmup):
    # whole numbers, so that no rounding moves a stair
    return lambda since_warmup: jnp.maximum(peak * factor ** ((since_warmup + warmup) // period), end)


def create(config: Mapping[str, Any], num_steps: int, steps_per_epoch: float = 1.0) -> optax.GradientTransformation:
    """The optimizer of `config`: clipping by global norm, then Adam, AMSGrad, AdamW or Muon on the schedule.

    AdamW decays matrices alone (decoupled, arXiv:1711.05101). AMSGrad (arXiv:1904.09237) keeps the largest second
    moment after its correction for the zero at the start. Muon makes the momentum of each matrix orthogonal before it
    is a step, as large as one of Adam would be (arXiv:2502.16982, its root mean square 0.2 times the rate), and decays
    matrices by `weight_decay`; biases, embeddings and final layers of one output learn with Adam (with Nesterov's
    momentum). With `clip_norm` 0 or None nothing is clipped.

    `freeze` holds patterns (* for any characters, / included) on the paths of parameters, "params/embedding/*". What
    they match gets updates of exactly zero, has no moments, and does not count in the norm that is clipped.

    `rates` gives groups of parameters factors to the learning rate: "params/backbone/*=0.1, params/head_*=1". The first
    pattern that matches counts; what none matches learns at the rate itself.

    Args:
      config, num_steps, steps_per_epoch: See `learning_rate`.

    Raises:
      ValueError: No such optimizer or schedule, a value out of its range; from `init`: a pattern of `freeze` that
        matches no parameter, or no parameter left to train.
    """
    rate = learning_rate(config, num_steps, steps_per_epoch)
    if config["name"] not in OPTIMIZERS:
        raise ValueError(unknown_name("optimizer.name", config["name"], OPTIMIZERS))
    _check(config, _OF_ALL_RULES)
    moments = {"b1": config["b1"], "b2": config["b2"], "eps": config["eps"]}
    if config["name"] == "adam":
        rule = optax.adam(rate, **moments)
    elif config["name"] == "amsgrad":
        rule = optax.amsgrad(rate, **moments)
    elif config["name"] == "muon":
        _check(config, {"weight_decay": _NOT_NEGATIVE})
        rule = _muon(rate, config["weight_decay"], moments)
    else:
        _check(config, {"weight_decay": _NOT_NEGATIVE})
        rule = optax.adamw(rate, weight_decay=config["weight_decay"], mask=_matrices, **moments)
    if config["clip_norm"]:
        _check(config, {"clip_norm": _NOT_NEGATIVE})
        rule = optax.chain(optax.clip_by_global_norm(config["clip_norm"]), rule)
    factors = rate_factors(config.get("rates", ""))
    if factors:
        rule = optax.chain(rule, optax.stateless(lambda updates, params: jax.tree.map(
            jnp.multiply, updates, _by_pattern(updates, factors))))
    patterns = config["freeze"]
    if isinstance(patterns, str):
        raise ValueError(f"optimizer.freeze must be a list of patterns, received the text {patterns!r}; "
                         f"write ({patterns!r},)")
    return _without(rule, tuple(patterns)) if patterns else rule


def _muon(rate, weight_decay: float, moments: Mapping[str, float]) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate, weight_decay=weight_decay, adam_b1=moments["b1"], adam_b2=moments["b2"], eps=moments["eps"],
        muon_weight_dimension_numbers=_of_matrices, consistent_rms=0.2)


def _of_matrices(params):
    """For each kernel with several inputs and outputs which axes those are; None for all other parameters.

    Axes before the last two are heads, each of which is a matrix of its own.
    """
    def of(path, p):
        is_matrix = parameter_path(path[-1:]) == "kernel" and p.ndim > 1 and min(p.shape[-2:]) > 1
        return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(of, params)


def rate_factors(text: str) -> dict[str, float]:
    """Factors by pattern.

    >>> rate_factors("params/backbone/*=0.1, params/head_gap/*=2")
    {'params/backbone/*': 0.1, 'params/head_gap/*': 2.0}

    Raises:
      ValueError: Something else.
    """
    factors = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        pattern, equals, value = (p.strip() for p in part.rpartition("="))
        try:
            factors[pattern] = float(value)
        except ValueError:
            equals = ""
        if not (equals and pattern and math.isfinite(factors[pattern]) and factors[pattern] >= 0):
            raise ValueError(f"optimizer.rates must be 'pattern=factor, pattern=factor' with factors of zero or more, "
                             f"received {text!r}")
    return factors


def _by_pattern(params, factors: Mapping[str, float]):
    """A tree like `params` of the factor of each leaf."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [parameter_path(path) for path, _ in leaves]
    for pattern in factors:
        _check_matches("optimizer.rates", pattern, paths)
    return jax.tree.unflatten(structure, [
        next((f for pattern, f in factors.items() if fnmatch.fnmatchcase(path, pattern)), 1.0) for path in paths])


def _check_matches(field: str, pattern: str, paths: Sequence[str]) -> None:
    if any(fnmatch.fnmatchcase(path, pattern) for path in paths):
        return
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
    raise ValueError(f"{field}: {pattern!r} matches none of the {len(paths)} parameters; the nearest are "
                     f"{', '.join(near)}. * stands for any characters.")


def _matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _without(rule: optax.GradientTransformation, patterns: tuple[str, ...]) -> optax.GradientTransformation:
    """`rule` for the parameters that match none of `patterns`, zero updates for the others."""

    def trained(params):
        return jax.tree.map(lambda is_frozen: not is_frozen, frozen(params, patterns))

    return optax.chain(optax.masked(rule, trained),
                       optax.masked(optax.set_to_zero(), lambda params: frozen(params, patterns)))


def parameter_path(path: Sequence[Any]) -> str:
    """Text of a path that jax.tree_util gives, as checkpoints have it: "params/embedding/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """A tree like `params` of whether each leaf's path matches one of `patterns` (fnmatch, upper case matters).

    Raises:
      ValueError: A pattern matches no parameter (the nearest paths are given), or all of them are matched.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [parameter_path(path) for path, _ in leaves]
    for pattern in patterns:
        _check_matches("optimizer.freeze", pattern, paths)
    matched = [any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) for path in paths]
    if all(matched):
        raise ValueError(f"optimizer.freeze: {', '.join(map(repr, patterns))} match all {len(paths)} parameters, so "
                         "that nothing is left to train; freeze fewer")
    return jax.tree.unflatten(structure, matched)


def plateau_options(config: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the options of `Plateau.update`, or None if the schedule is another; `config` is config.optimizer."""
    if config["schedule"] != "plateau":
        return None
    return {"patience": config["plateau_patience"], "factor": config["decay_factor"],
            "threshold": config["plateau_threshold"],
            "floor": config["learning_rate_end"] / config["learning_rate"]}


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Factor to the learning rate that goes down when validation gets no better (torch's ReduceLROnPlateau).

    It lives on the host; `dataclasses.asdict` makes JSON of it and Plateau(**that) brings it back. It equals
    optax.contrib.reduce_on_plateau for one validation per epoch; that one counts validations, not epochs, and its
    state would not resume from the JSON of existing checkpoints.

    Attributes:
      scale: The factor.
      best: Lowest validation loss.
      epoch_of_best: Finished epochs at that time, or when the scale last went down: patience is counted from here.
    """

    scale: float = 1.0
    best: float = math.inf
    epoch_of_best: float = 0.0

    def update(self, value: float, epoch: float, *, patience: float, factor: float, threshold: float,
               floor: float = 0.0) -> Plateau:
        """What it becomes after a validation.

        Args:
          value: The validation loss; NaN is no improvement.
          epoch: Finished epochs, not necessarily whole.
          patience: Epochs without an improvement that are endured, however often validation comes in them.
          factor: What the scale is multiplied with then.
          threshold: An improvement is a value below best * (1 - threshold).
          floor: Lowest scale: learning_rate_end / learning_rate.
        """
        if value < self.best * (1.0 - threshold):
            return dataclasses.replace(self, best=float(value), epoch_of_best=float(epoch))
        # epochs are steps over steps of an epoch, so that equal spans may differ in the last digits
        if epoch - self.epoch_of_best > patience + 1e-6:
            return dataclasses.replace(self, scale=max(self.scale * factor, floor), epoch_of_best=float(epoch))
        return self


def _check_rates(config, steps_per_epoch):
    _check(config, _OF_ALL_RATES | _OF_SCHEDULE.get(config["schedule"], {}))
    peak, end = config["learning_rate"], config["learning_rate_end"]
    if config["schedule"] != "constant" and end > peak:
        raise ValueError(f"optimizer.learning_rate_end must not be above optimizer.learning_rate ({peak}), received "
                         f"{end}; lower it, or set optimizer.schedule to 'constant'")
    if not (math.isfinite(steps_per_epoch) and steps_per_epoch > 0):
        raise ValueError(f"steps_per_epoch must be a positive number, received {steps_per_epoch!r}")


def _check(config, rules):
    for field, (holds, expected) in rules.items():
        value = config[field]
        if not (isinstance(value, numbers.Real) and math.isfinite(value) and holds(value)):
            raise ValueError(f"optimizer.{field} must be {expected}, received {value!r}")
