"""Energy terms that can be added to any model: one file each, found by name.

`mlip_jax/terms/<name>.py` contains one class `Term`, a flax.linen module:
`Term(**options)(graph, features)` returns energies (N,) in eV and a dict of per-atom predictions,
computed from the invariant features (N, F) of a model. Its class attribute `long_range` indicates
whether it uses the graph's long-range pairs. If so it has a field `cutoff`, in Å or None, whose
default is that of configs if `own_cutoff` is set. A property
`lattice_sum` describes its sum over the lattice of crystals, None if it has none.
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
from mlip_jax.graphs.long_range import LatticeSumCutoff
from mlip_jax.models.layers.forces import has_direct_forces, is_conservative
from mlip_jax.models.layers.heads import AtomOutputs


def names() -> list[str]:
    """Return the names of all terms."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def create(name: str, **options) -> nn.Module:
    """Create the term `name` with `options`, the fields of its class.

    Raises:
      ValueError: Unknown term or option; the message lists the known ones.
    """
    term = _module(name).Term
    known = [f for f in term.__dataclass_fields__ if f not in ("parent", "name")]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of term {name!r}", option, known))
    return term(**options)


def check_elements(terms: Iterable[str], numbers: Iterable[int]) -> None:
    """Raise ValueError if a term has no parameters for an element.

    Args:
      terms: Names of terms.
      numbers: Atomic numbers.
    """
    numbers = list(numbers)
    for name in terms:
        check = getattr(_module(name), "check_elements", None)
        if check is not None:
            check(numbers)


def with_terms(model: nn.Module, terms: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Add energy terms to a model.

    Args:
      model: Model that follows the contract of mlip_jax.models.
      terms: {name: options}. A short-range term has the cutoff of the model unless its options give
        another one. For a long-range term an infinite cutoff is equivalent to None.

    Returns:
      A `WithTerms`, or the model itself if there are no terms.

    Raises:
      ValueError: Unknown name or option, a cutoff that is not a positive number, or a short-range
        term with a larger cutoff than the model.
    """
    if not terms:
        return model
    chosen = []
    for name in sorted(terms):
        term, options = create(name, **terms[name]), dict(terms[name])
        if not term.long_range or "cutoff" in options:
            options["cutoff"] = _cutoff(
                name, options.get("cutoff", float(model.cutoff)), term.long_range, model.cutoff
            )
        chosen.append((name, tuple(sorted(options.items()))))
    return WithTerms(model, tuple(chosen))


def _cutoff(name, cutoff, long_range, model_cutoff):
    """Return the cutoff of a term (Å), None for all pairs, after checking it."""
    if long_range and (cutoff is None or cutoff == math.inf):
        return None
    if not isinstance(cutoff, Real) or not cutoff > 0:
        also = ", or None for all pairs" if long_range else ""
        raise ValueError(
            f"term {name!r} has cutoff={cutoff!r}; expected a positive number (Å){also}"
        )
    if not long_range and cutoff > model_cutoff:
        raise ValueError(
            f"term {name!r} has cutoff={cutoff:g} Å, but the model's edges end at "
            f"{model_cutoff:g} Å. Set a cutoff of at most that."
        )
    return cutoff


class WithTerms(nn.Module):
    """Model with further energy terms.

    The parameters are "model" and one entry per term under its name.

    Attributes:
      model: Model that follows the contract of mlip_jax.models.
      terms: ((name, ((option, value), ...)), ...), see `with_terms`.
    """

    model: nn.Module
    terms: tuple

    @property
    def cutoff(self) -> float:
        """Cutoff radius of the model (Å)."""
        return self.model.cutoff

    @property
    def long_range_cutoff(self) -> float | LatticeSumCutoff | None:
        """Distance up to which the terms need long-range pairs (Å).

        It is inf if a term needs all pairs and None if no term needs any. If a term sums over the
        lattice of crystals, it is a `LatticeSumCutoff`.
        """
        terms = [create(name, **dict(options)) for name, options in self.terms]
        cutoffs = [
            float("inf") if term.cutoff is None else float(term.cutoff)
            for term in terms
            if term.long_range
        ]
        sums = tuple(s for term in terms if (s := getattr(term, "lattice_sum", None)))
        return LatticeSumCutoff(max(cutoffs), sums) if sums else max(cutoffs, default=None)

    @property
    def neighbor_slots(self) -> bool | str:
        """Whether the model uses neighbors in slots, see graphs/neighbor_slots.py."""
        return getattr(self.model, "neighbor_slots", False)

    @property
    def direct_forces(self) -> bool:
        """Whether the model predicts forces; those of the terms are minus their gradient."""
        return has_direct_forces(self.model)

    @property
    def conservative(self) -> bool:
        """Whether forces are minus the gradient of the energy; see layers.forces."""
        return is_conservative(self.model)

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
    """Return the module of a term."""
    if name not in names():
        raise ValueError(unknown_name("energy term", name, names()))
    return importlib.import_module(f"{__name__}.{name}")
