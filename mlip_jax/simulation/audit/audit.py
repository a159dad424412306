"""Audit of a force field: all checks of `checks.py`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from mlip_jax.defaults.audit import CHECKS
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.potential import Potential
from mlip_jax.simulation.audit import checks
from mlip_jax.simulation.audit.checks import AuditCheck, Auditor
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.force_fields import load_mean_force_field
from mlip_jax.simulation.reference.oracle import Method

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AuditOptions:
    """Options of an audit.

    Attributes:
      checks: Names of the checks to run, some of CHECKS.
      reference: Reference method as in `Method.name`; "none" compares with none.
      reference_options: Keyword arguments of its calculator.
      num_conformers: Conformers per molecule.
      picoseconds: Length of each trajectory (ps).
      temperature: Temperature of the dynamics that test the stability (K).
      dtype: "float32" or "float64", for scans and relaxations.
    """

    checks: tuple[str, ...] = CHECKS
    reference: str = "GFN2-xTB"
    reference_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_conformers: int = 8
    picoseconds: float = 2.0
    temperature: float = 500.0
    dtype: str = "float64"

    def __post_init__(self):
        if unknown := set(self.checks) - set(CHECKS):
            raise ValueError(
                f"checks must be some of {', '.join(CHECKS)}; received {', '.join(sorted(unknown))}"
            )
        for name in ("num_conformers", "picoseconds", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, received {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """Result of an audit.

    Attributes:
      potential: The force field.
      options: Options of the audit.
      checks: Results of the checks by name.
      notes: Parts that were skipped as a whole.
    """

    potential: Potential
    options: AuditOptions
    checks: dict[str, AuditCheck]
    notes: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """Return the summary of all checks: values by name."""
        return {name: v for check in self.checks.values() for name, v in check.scores.items()}


def audit(force_field: Any = BUNDLED, **options: Any) -> AuditResult:
    """Examine a force field with scans, conformers, dimers, rings and dynamics of small molecules.

    >>> result = audit("runs/spice", picoseconds=1)  # doctest: +SKIP
    >>> result.scores["mean error of torsions (meV)"]  # doctest: +SKIP

    All geometries are generated. Comparisons with the reference method are skipped, with a note, if
    its package is not installed. Molecules with elements that the force field does not know are
    skipped by name.

    Args:
      force_field: Force field in any form that `simulation.force_fields.load_mean_force_field`
        accepts; by default that of the package.
      **options: Fields of `AuditOptions`.

    Raises:
      ValueError: If an option is invalid.
      CheckpointError: If there is no force field at this location.
      ImportError: If RDKit is missing, which generates the geometries.
    """
    settings, potential = AuditOptions(**options), load_mean_force_field(force_field)
    reference, notes = _reference(settings)
    auditor = Auditor(
        potential, MLIPCalculator(potential, settings.dtype), reference, settings.dtype
    )
    functions = {
        "bonds": lambda: checks.bond_scans(auditor),
        "torsions": lambda: checks.torsion_scans(auditor),
        "conformers": lambda: checks.conformer_energies(auditor, settings.num_conformers),
        "dimers": lambda: checks.dimers(auditor),
        "rings": lambda: checks.relaxed_geometries(auditor),
        "dynamics": lambda: checks.dynamics(auditor, settings.picoseconds, settings.temperature),
    }
    results = {}
    for name in settings.checks:
        log.info("audit: %s", name)
        results[name] = functions[name]()
        for reason in results[name].skipped:
            log.warning("%s: skipped %s", name, reason)
    return AuditResult(potential, settings, results, notes)


def _reference(settings: AuditOptions) -> tuple[Method | None, tuple[str, ...]]:
    """Return the reference method, or None, and notes."""
    if settings.reference == "none":
        return None, ("There is no reference method, so nothing is compared with one.",)
    try:
        return Method(settings.reference, settings.reference_options), ()
    except ImportError as error:
        log.warning("comparisons with %s are skipped: %s", settings.reference, error)
        return None, (f"Comparisons with {settings.reference} are skipped: {error}",)
