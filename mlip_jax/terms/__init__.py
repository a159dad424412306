"""Energy terms that can be added to any model: one file each, found by its name.

`mlip_jax/terms/<name>.py` holds one class `Term`, a flax.linen module: `Term(**options)(graph, features)` gives
energies (N,) in eV and a dict of predictions for each atom, from the invariant features (N, F) of a model. Its class
attribute `long_range` says whether it works on the graph's long-range pairs; if so it has a field `cutoff`, Å or None.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import flax.linen as nn
import jraph

from mlip_jax.config import unknown_name
from mlip_jax.models.layers.heads import AtomOutputs


def names() -> list[str]:
    """Names of the terms that there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def create(name: str, **options) -> nn.Module:
    """The term `name` with `options`, the fields of its class.

    Raises:
      ValueError: No term has that name, or it has no such option; the message says which there are.
    """
    term = _module(name).Term
    known = [f for f in term.__dataclass_fields__ if f not in ("parent", "name")]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of term {name!r}", option, known))
    return term(**options)


def check_elements(terms: Iterable[str], numbers: Iterable[int]) -> None:
    """Raise ValueError where a term has no values for an element.

    Args:
      terms: Their names.
      numbers: Atomic numbers.
    """
    numbers = list(numbers)
    for name in terms:
        check = getattr(_module(name), "check_elements", None)
        if check is not None:
            check(numbers)


def with_terms(model: nn.Module, terms: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """The model with terms added: itself if there are none, else a `WithTerms`.

    Args:
      model: On the contract of mlip_jax.models.
      terms: {name: options}. A term of short range has the model's cutoff unless its options say another; an infinite
        cutoff of a term of long range is the same as None.

    Raises:
      ValueError: Unknown name or option, a cutoff that is not a positive number, or a term of short range with a
        larger cutoff than the model's.
    """
    if not terms:
        return model
    chosen = []
    for name in sorted(terms):
        term, options = create(name, **terms[name]), dict(terms[name])
        if not term.long_range or "cutoff" in options:
            options["cutoff"] = _cutoff(name, options.get("cutoff", float(model.cutoff)), term.long_range, model.cutoff)
        chosen.append((name, tuple(sorted(options.items()))))
    return WithTerms(model, tuple(chosen))


def _cutoff(name, cutoff, long_range, model_cutoff):
    if long_range and (cutoff is None or cutoff == math.inf):
        return None
    if not isinstance(cutoff, Real) or not cutoff > 0:
        also = ", or None for all pairs" if long_range else ""
        raise ValueError(f"term {name!r} has cutoff={cutoff!r}; expected a positive number (Å){also}")
    if not long_range and cutoff > model_cutoff:
        raise ValueError(f"term {name!r} has cutoff={cutoff:g} Å, but the model's edges end at {model_cutoff:g} Å; "
                         "give a cutoff of at most that")
    return cutoff


class WithTerms(nn.Module):
    """A model and further energy terms. Parameters: "model", and one entry for each term by its name.

    Attributes:
      model: On the contract of mlip_jax.models.
      terms: ((name, ((option, value), ...)), ...), see `with_terms`.
    """

    model: nn.Module
    terms: tuple

    @property
    def cutoff(self) -> float:
        """The model's, Å."""
        return self.model.cutoff

    @property
    def long_range_cutoff(self) -> float | None:
        """Å that the list of long-range pairs must reach; infinity: all pairs; None: no list is wanted."""
        terms = [create(name, **dict(options)) for name, options in self.terms]
        cutoffs = [float("inf") if term.cutoff is None else float(term.cutoff) for term in terms if term.long_range]
        return max(cutoffs, default=None)

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        outputs = self.model(graph)
        features = outputs.features[:, 0, 0, :]
        energies, properties = dict(outputs.terms), dict(outputs.properties)
        for name, options in self.terms:
            term = _module(name).Term(**dict(options), name=name)
            energies[name], predicted = term(graph, features)
            properties.update(predicted)
        return outputs._replace(terms=energies, properties=properties)


def _module(name: str):
    if name not in names():
        raise ValueError(unknown_name("energy term", name, names()))
    return importlib.import_module(f"{__name__}.{name}")
