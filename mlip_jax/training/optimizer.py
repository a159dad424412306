"""Optimizers, learning-rate schedules and frozen parameters, created from a config."""

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

from mlip_jax.config import unknown_name
from mlip_jax.training.device import rules
from mlip_jax.training.device.intervals import default_warmup
from mlip_jax.training.parameters.low_rank import low_rank, weight_path
from mlip_jax.training.parameters.paths import parameter_path

OPTIMIZERS = ("adam", "amsgrad", "adamw", "muon")
SCHEDULES = ("cosine", "exponential", "step", "plateau", "constant")

_POSITIVE = (lambda x: x > 0, "a positive number")
_NOT_NEGATIVE = (lambda x: x >= 0, "zero or a positive number")
_BELOW_ONE = (lambda x: 0 <= x < 1, "at least 0 and below 1")
_BETWEEN_ZERO_AND_ONE = (lambda x: 0 < x < 1, "between 0 and 1, both excluded")

_RATE_RULES = {
    "learning_rate": _POSITIVE,
    "learning_rate_end": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
}
_SCHEDULE_RULES = {
    "exponential": {
        "learning_rate_end": (
            lambda x: x > 0,
            "positive, because an exponential never reaches zero",
        )
    },
    "step": {"decay_factor": _BETWEEN_ZERO_AND_ONE, "decay_epochs": _POSITIVE},
    "plateau": {
        "decay_factor": _BETWEEN_ZERO_AND_ONE,
        "plateau_patience": _NOT_NEGATIVE,
        "plateau_threshold": _BELOW_ONE,
    },
}
_MOMENT_RULES = {"b1": _BELOW_ONE, "b2": _BELOW_ONE, "eps": _POSITIVE}


def learning_rate(
    config: Mapping[str, Any], num_steps: int, steps_per_epoch: float = 1.0
) -> Callable[[Any], jax.Array]:
    """Return the schedule `step -> learning rate`.

    The rate rises linearly to `learning_rate` during the warm-up. Then `schedule` applies:

        cosine, exponential   decay to learning_rate_end at the last step
        step                  multiplied by decay_factor every decay_epochs (rounded to whole steps,
                              counted from the first step of the run), at least learning_rate_end
        plateau, constant     no decay; for "plateau", `Plateau` computes an additional factor

    Args:
      config: Options of the optimizer, config.optimizer.
      num_steps: Number of steps of the run.
      steps_per_epoch: Number of steps per epoch, which "step" uses.

    Raises:
      ValueError: The schedule is unknown, or a value is out of range.
    """
    schedule = config["schedule"]
    if schedule not in SCHEDULES:
        raise ValueError(unknown_name("optimizer.schedule", schedule, SCHEDULES))
    _check_rates(config, steps_per_epoch)
    peak, end = float(config["learning_rate"]), float(config["learning_rate_end"])
    warmup = config["warmup_steps"]
    if warmup is None:
        warmup = default_warmup(num_steps)
    warmup = min(int(warmup), max(num_steps - 1, 0))
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
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, warmup), decay], [warmup]
    )


def _staircase(peak, end, factor, period, warmup):
    """Return the schedule of "step", a function of the number of steps since the warm-up."""
    # integer division, so that rounding errors cannot shift a decay by a step
    return lambda since_warmup: jnp.maximum(
        peak * factor ** ((since_warmup + warmup) // period), end
    )


def create(
    config: Mapping[str, Any], num_steps: int, steps_per_epoch: float = 1.0
) -> optax.GradientTransformation:
    """Create the optimizer of a config: clipping by global norm, then an update rule.

    The update rules are:

        adam      Adam
        amsgrad   AMSGrad (arXiv:1904.09237); it keeps the maximum of the bias-corrected second
                  moments
        adamw     Adam with decoupled weight decay of the matrices (arXiv:1711.05101)
        muon      Muon orthogonalizes the momentum of each matrix and scales it to the size of an
                  Adam step (root mean square of 0.2 times the rate, arXiv:2502.16982). Matrices
                  decay by `weight_decay`. Biases, embeddings and final layers with one output use
                  Adam with Nesterov momentum.

    Other fields of the config:

        clip_norm   Maximum global norm of the gradient; 0 or None for no clipping.
        freeze      Patterns of parameter paths such as "params/embedding/*", where * matches any
                    characters including "/". Matching parameters get updates of exactly zero, have
                    no moments and are excluded from the norm that is clipped.
        lr_multipliers  Learning-rate factors by pattern: "params/backbone/*=0.1, params/head_*=1".
                    The first matching pattern applies. Without a match the factor is 1.
        low_rank    Rank of the updates of linear layers; see parameters/low_rank.py. 0 trains all
                    parameters that are not frozen.

    Args:
      config: Options of the optimizer, config.optimizer.
      num_steps: Number of steps of the run.
      steps_per_epoch: Number of steps per epoch.

    Raises:
      ValueError: The optimizer or schedule is unknown, or a value is out of range. Its `init`
        raises ValueError if a pattern matches no parameter, or if all are frozen.
    """
    rate = learning_rate(config, num_steps, steps_per_epoch)
    if config["name"] not in OPTIMIZERS:
        raise ValueError(unknown_name("optimizer.name", config["name"], OPTIMIZERS))
    _check(config, _MOMENT_RULES)
    moments = {"b1": config["b1"], "b2": config["b2"], "eps": config["eps"]}
    if config["name"] == "adam":
        rule = rules.adam(rate, moments)
    elif config["name"] == "amsgrad":
        rule = rules.amsgrad(rate, moments)
    else:
        _check(config, {"weight_decay": _NOT_NEGATIVE})
        decaying = {"adamw": rules.adamw, "muon": rules.muon}[config["name"]]
        rule = decaying(rate, config["weight_decay"], moments)
    if config["clip_norm"]:
        _check(config, {"clip_norm": _NOT_NEGATIVE})
        rule = optax.chain(rules.clip(config["clip_norm"]), rule)
    factors = parse_multipliers(config.get("lr_multipliers", ""))
    if factors:
        rule = optax.chain(
            rule,
            optax.stateless(
                lambda updates, params: jax.tree.map(
                    jnp.multiply, updates, _multiplier_tree(updates, factors)
                )
            ),
        )
    if rank := config.get("low_rank", 0):
        if config["schedule"] == "plateau":
            raise ValueError(
                "optimizer.low_rank cannot be combined with optimizer.schedule=plateau, which scales "
                "the updates of the merged weights. Choose another schedule."
            )
        rule = low_rank(rule, rank)
    patterns = config["freeze"]
    if isinstance(patterns, str):
        raise ValueError(
            f"optimizer.freeze must be a list of patterns, received the text {patterns!r}. "
            f"Write ({patterns!r},)."
        )
    rule = _freeze(rule, tuple(patterns)) if patterns else rule

    def init(params):
        _check_multipliers(params, factors)
        return rule.init(params)

    return optax.GradientTransformation(init, rule.update)


def parse_multipliers(text: str) -> dict[str, float]:
    """Parse the field "lr_multipliers" into a dictionary {pattern: factor}.

    >>> parse_multipliers("params/backbone/*=0.1, params/head_gap/*=2")
    {'params/backbone/*': 0.1, 'params/head_gap/*': 2.0}

    Raises:
      ValueError: The text has another format, or a factor is negative or not finite.
    """
    factors = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        pattern, equals, value = (p.strip() for p in part.rpartition("="))
        try:
            factors[pattern] = float(value)
        except ValueError:
            equals = ""
        if not (equals and pattern and math.isfinite(factors[pattern]) and factors[pattern] >= 0):
            raise ValueError(
                "optimizer.lr_multipliers must be 'pattern=factor, pattern=factor' with factors of "
                f"at least 0, received {text!r}"
            )
    return factors


def _multiplier_tree(updates, factors: Mapping[str, float]):
    """Return a tree like `updates` with the factor of each leaf.

    Frozen parameters have no updates, so a pattern need not match one of them.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
    paths = [parameter_path(weight_path(path, leaf)) for path, leaf in leaves]
    return jax.tree.unflatten(
        structure,
        [
            next((f for pattern, f in factors.items() if fnmatch.fnmatchcase(path, pattern)), 1.0)
            for path in paths
        ],
    )


def _check_multipliers(params, factors: Mapping[str, float]) -> None:
    """Raise ValueError if a pattern of `factors` matches no parameter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [parameter_path(path) for path, _ in leaves]
    for pattern in factors:
        _check_matches("optimizer.lr_multipliers", pattern, paths)


def _check_matches(field: str, pattern: str, paths: Sequence[str]) -> None:
    """Raise ValueError if `pattern` matches none of `paths`; the message lists the nearest ones."""
    if any(fnmatch.fnmatchcase(path, pattern) for path in paths):
        return
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
    raise ValueError(
        f"{field}: {pattern!r} matches none of the {len(paths)} parameters; the nearest are "
        f"{', '.join(near)}. * matches any characters."
    )


def _freeze(
    rule: optax.GradientTransformation, patterns: tuple[str, ...]
) -> optax.GradientTransformation:
    """Apply `rule` to the parameters that match none of `patterns`; the others get zero updates."""

    def trained(params):
        return jax.tree.map(lambda is_frozen: not is_frozen, frozen(params, patterns))

    return optax.chain(
        optax.masked(rule, trained),
        optax.masked(optax.set_to_zero(), lambda params: frozen(params, patterns)),
    )


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """Return a tree like `params` with True for each leaf whose path matches a pattern.

    Args:
      params: Parameters.
      patterns: Patterns of fnmatch, case-sensitive.

    Raises:
      ValueError: A pattern matches no parameter (the message lists the nearest paths), or all
        parameters match.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [parameter_path(path) for path, _ in leaves]
    for pattern in patterns:
        _check_matches("optimizer.freeze", pattern, paths)
    matched = [any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) for path in paths]
    if all(matched):
        raise ValueError(
            f"optimizer.freeze: {', '.join(map(repr, patterns))} match all {len(paths)} "
            "parameters. Freeze fewer parameters."
        )
    return jax.tree.unflatten(structure, matched)


def check_patterns(params: Any, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a pattern of `freeze` or `lr_multipliers` matches no parameter.

    Args:
      params: Parameters, or their shapes.
      config: Options of the optimizer, config.optimizer.
    """
    if config["freeze"]:
        frozen(params, config["freeze"])
    _check_multipliers(params, parse_multipliers(config.get("lr_multipliers", "")))


def plateau_options(config: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the options of `Plateau.update`, or None if the schedule is not "plateau".

    Args:
      config: Options of the optimizer, config.optimizer.
    """
    if config["schedule"] != "plateau":
        return None
    return {
        "patience": config["plateau_patience"],
        "factor": config["decay_factor"],
        "threshold": config["plateau_threshold"],
        "floor": config["learning_rate_end"] / config["learning_rate"],
    }


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Learning-rate factor that is reduced when the validation loss stops improving.

    The rule is that of torch's ReduceLROnPlateau. The state is on the host: `dataclasses.asdict`
    converts it to JSON, and `Plateau(**fields)` restores it. For one validation per epoch it equals
    optax.contrib.reduce_on_plateau. The latter counts validations instead of epochs, and its state
    could not be restored from the JSON of existing checkpoints.

    Attributes:
      scale: Factor of the learning rate.
      best: Lowest validation loss.
      epoch_of_best: Number of epochs at the lowest loss or at the last reduction, whichever is
        later. Patience is counted from here.
    """

    scale: float = 1.0
    best: float = math.inf
    epoch_of_best: float = 0.0

    def update(
        self,
        value: float,
        epoch: float,
        *,
        patience: float,
        factor: float,
        threshold: float,
        floor: float = 0.0,
    ) -> Plateau:
        """Return the state after a validation.

        Args:
          value: Validation loss. NaN is not an improvement.
          epoch: Number of epochs so far, which may be fractional.
          patience: Number of epochs without improvement before a reduction. It does not depend on
            the number of validations per epoch.
          factor: Factor of a reduction.
          threshold: A loss below best * (1 - threshold) is an improvement.
          floor: Minimum of the scale, learning_rate_end / learning_rate.
        """
        if value < self.best * (1.0 - threshold):
            return dataclasses.replace(self, best=float(value), epoch_of_best=float(epoch))
        # An epoch is a ratio of step counts, so equal spans may differ by rounding errors.
        if epoch - self.epoch_of_best > patience + 1e-6:
            return dataclasses.replace(
                self, scale=max(self.scale * factor, floor), epoch_of_best=float(epoch)
            )
        return self


def _check_rates(config, steps_per_epoch):
    """Raise ValueError if a field of the schedule is out of range."""
    rules = _RATE_RULES | _SCHEDULE_RULES.get(config["schedule"], {})
    if config["warmup_steps"] is None:
        del rules["warmup_steps"]
    _check(config, rules)
    peak, end = config["learning_rate"], config["learning_rate_end"]
    if config["schedule"] != "constant" and end > peak:
        raise ValueError(
            f"optimizer.learning_rate_end must be at most optimizer.learning_rate ({peak}), "
            f"received {end}. Lower it, or set optimizer.schedule to 'constant'."
        )
    if not (math.isfinite(steps_per_epoch) and steps_per_epoch > 0):
        raise ValueError(f"steps_per_epoch must be a positive number, received {steps_per_epoch!r}")


def _check(config, rules):
    """Raise ValueError if a field violates its rule, a pair (predicate, description)."""
    for field, (holds, expected) in rules.items():
        value = config[field]
        if not (isinstance(value, numbers.Real) and math.isfinite(value) and holds(value)):
            raise ValueError(f"optimizer.{field} must be {expected}, received {value!r}")
