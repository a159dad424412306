"""Energy terms that are added to a force field when it is loaded, and changes of its terms.

They are options of any force field, as in "X.model#dispersion=pbe" and "runs/a#k_vectors=20000", and of
all members of an ensemble, as in "runs/a,runs/b##dispersion=pbe".
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

from mlip_jax import terms
from mlip_jax.potential import Potential
from mlip_jax.terms.layers.d3_functionals import parameters_of
from mlip_jax.terms.layers.d3_reference import LAST_ELEMENT

log = logging.getLogger(__name__)

# OPTIONS: dispersion: functional of the D3(BJ) term. k_vectors: largest number of reciprocal
# vectors of the Ewald sums.
OPTIONS = ("dispersion", "k_vectors")
# _DISPERSION: parts of the names of methods with a dispersion correction of their own.
_DISPERSION = re.compile(r"D[234]\b|GFN|MBD|VV10|3c\b|[MX]-[DV]\b")


def split_term_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of an importer and those of this module."""
    ours = {name: value for name, value in options.items() if name in OPTIONS}
    return {name: value for name, value in options.items() if name not in OPTIONS}, ours


def add_terms(potential: Potential, options: Mapping[str, Any]) -> Potential:
    """Return a force field with a D3 term or with other Ewald sums.

    Args:
      potential: The force field.
      options: Options of this module, see OPTIONS.

    Raises:
      ValueError: Unknown functional, or the options do not suit the force field.
    """
    if "k_vectors" in options:
        potential = _with_k_vectors(potential, options["k_vectors"])
    if options.get("dispersion"):
        potential = _with_dispersion(potential, str(options["dispersion"]))
    return potential


def _with_dispersion(potential: Potential, functional: str) -> Potential:
    """Return a force field with the D3(BJ) term of a functional."""
    parameters_of(functional)
    model, params, chosen = _separate(potential)
    if present := sorted({"d3", "dispersion"} & set(chosen)):
        raise ValueError(
            f"the force field already has the dispersion term {present[0]!r}; remove "
            f"dispersion={functional}"
        )
    level = potential.metadata.get("statistics", {}).get("level_of_theory", "")
    if _DISPERSION.search(level):
        log.warning(
            "the force field was trained on %s, which includes dispersion; dispersion=%s counts it "
            "twice",
            level,
            functional,
        )
    without = sorted(z for z in potential.elements if z > LAST_ELEMENT)
    if without:
        log.warning("D3 has no parameters for elements %s; they are not available", without)
    return dataclasses.replace(
        potential,
        model=terms.with_terms(model, chosen | {"d3": {"functional": functional}}),
        params={"params": params},
        elements=tuple(z for z in potential.elements if z <= LAST_ELEMENT),
        metadata=_with_level(potential.metadata, f"{level} + D3(BJ)")
        if level
        else potential.metadata,
    )


def _with_level(metadata: Mapping[str, Any], level: str) -> dict[str, Any]:
    """Return metadata with another level of theory."""
    return {**metadata, "statistics": {**metadata["statistics"], "level_of_theory": level}}


def _with_k_vectors(potential: Potential, k_vectors: Any) -> Potential:
    """Return a force field that accepts another number of reciprocal vectors."""
    model, params, chosen = _separate(potential)
    if chosen.get("electrostatics", {}).get("method") != "ewald":
        raise ValueError(f"the force field has no Ewald sums: remove k_vectors={k_vectors}")
    if not (isinstance(k_vectors, int | float) and k_vectors >= 1 and int(k_vectors) == k_vectors):
        raise ValueError(f"k_vectors must be an integer of at least 1, received {k_vectors}")
    chosen["electrostatics"]["k_vectors"] = int(k_vectors)
    return dataclasses.replace(
        potential, model=terms.with_terms(model, chosen), params={"params": params}
    )


def _separate(potential: Potential) -> tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the model without terms, the parameters of a model with terms, and their options."""
    model, params = potential.model, potential.params.get("params", {})
    if isinstance(model, terms.WithTerms):
        return model.model, dict(params), {name: dict(given) for name, given in model.terms}
    return model, {"model": params}, {}
