"""Ensembles of predictors, with the domain and the prediction intervals of each member."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from mlip_jax import models
from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.property_data import Target
from mlip_jax.datasets.smiles.bond_graph import bond_graph, has_order_of
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.graphs.shapes import GrowingBudget
from mlip_jax.predictor import EMBEDDING, Predictor
from mlip_jax.simulation.trust import intervals as interval_files
from mlip_jax.simulation.trust.domain import FILE as DOMAIN_FILE
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.simulation.trust.intervals import EnsembleIntervals, ValidationErrors
from mlip_jax.structure import from_ase

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Predictors of the same properties, with a domain and a padding budget per predictor.

    Attributes:
      members: Predictors.
      domains: Domain of each member.
      budgets: Padding budget of each member, for consecutive calls.
      intervals: Prediction intervals; None if a member was trained by a version without them.
    """

    members: tuple[Predictor, ...]
    domains: tuple[Domain, ...]
    budgets: tuple[GrowingBudget, ...]
    intervals: EnsembleIntervals | None = None

    @classmethod
    def load(cls, text: str) -> Ensemble:
        """Load the predictors of a comma-separated list of workdirs, e.g. "runs/gap-0,runs/gap-1".

        Raises:
          ConfigError: The members predict different properties.
          CheckpointError: A workdir has no readable checkpoint.
        """
        paths = [p.strip() for p in text.split(",") if p.strip()]
        members = tuple(Predictor.load(path) for path in paths)
        names = [[(t.name, t.kind) for t in m.targets] for m in members]
        if any(n != names[0] for n in names) or not names[0]:
            raise ConfigError(
                "predictor: members of an ensemble must predict the same properties, received "
                + "; ".join(
                    f"{path}: {', '.join(name for name, _ in member) or 'nothing'}"
                    for path, member in zip(paths, names)
                )
            )
        return cls(
            members,
            tuple(Domain.load(Path(p) / DOMAIN_FILE) for p in paths),
            tuple(GrowingBudget() for _ in paths),
            _load_intervals(paths, [t.name for t in members[0].targets if t.kind == "scalar"]),
        )

    @property
    def targets(self) -> tuple[Target, ...]:
        """Properties that the ensemble predicts, except properties of atoms."""
        return tuple(t for t in self.members[0].targets if t.kind != "atom")

    @property
    def reads_positions(self) -> bool:
        """Whether a member reads positions."""
        return any(m.reads_positions for m in self.members)

    @property
    def elements(self) -> frozenset[int]:
        """Elements that all ensemble members were trained on."""
        return frozenset.intersection(*(frozenset(m.elements) for m in self.members))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of `predict`."""
        names = []
        for t in self.targets:
            names += [t.name] if t.kind == "scalar" else [f"{t.name}_{x}" for x in "xyz"]
            names += [f"{t.name}_std"] if len(self.members) > 1 else []
            names += [f"{t.name}_expected_error"]
            names += [f"{t.name}_lower", f"{t.name}_upper"] if t.kind == "scalar" else []
        return (*names, "domain_distance", "outside_domain")

    def problem(self, record: MoleculeRecord) -> str:
        """Return the reason why a molecule cannot be predicted, "" if it can."""
        unknown = sorted(set(record.atoms.numbers.tolist()) - self.elements)
        if unknown:
            symbols = ", ".join(chemical_symbols[z] for z in unknown)
            return f"the predictor was not trained on {symbols}"
        members = [m for m in self.members if m.reads_bonds]
        graph = bond_graph(record.smiles) if members else None
        if members and graph is None:
            return "the predictor reads the bonds of a SMILES, which the molecule does not have"
        for member in members:
            limit = models.max_heavy_atoms(member.model)
            if limit is not None and len(graph.atoms) > limit:
                return f"{len(graph.atoms)} heavy atoms; the predictor reads at most {limit}"
            if member.reads_positions and not has_order_of(graph, record.bonds):
                return "the predictor needs a geometry with the atoms in the order of the SMILES"
        return ""

    def predict(
        self,
        molecules: Sequence[Sequence[Atoms]],
        weights: Sequence[np.ndarray],
        batch_size: int,
        coverage: float,
    ) -> dict[str, np.ndarray]:
        """Predict molecules, each as a weighted average over its conformers.

        Args:
          molecules: Conformers of each of M molecules.
          weights: Weights of the conformers, which add up to one for each molecule.
          batch_size: Average number of conformers per batch.
          coverage: Probability that an interval contains the property.

        Returns:
          Columns by name, (M,) each: those of `columns`. NaN if unknown.
        """
        columns = Columns.from_structures(
            from_ase(atoms, smiles=str(atoms.info.get("smiles", "")))
            for conformers in molecules
            for atoms in conformers
        )
        predictions = [
            m.predict(columns, batch_size, budget, with_embedding=True)
            for m, budget in zip(self.members, self.budgets)
        ]
        first = np.concatenate([[0], np.cumsum([len(w) for w in weights])])[:-1]
        flat = np.concatenate(weights)

        def average(values):
            """Average over conformers: (..., conformers) -> (..., M)."""
            return np.add.reduceat(values * flat, first, axis=-1)

        distances = [average(d.distance(p[EMBEDDING])) for d, p in zip(self.domains, predictions)]
        # in units of the border of each domain: (members, M)
        relative = np.array([x / d.border for d, x in zip(self.domains, distances)])
        result: dict[str, np.ndarray] = {}
        for t in self.targets:
            # (members, M), or (members, 3, M) for vectors
            values = average(np.array([np.moveaxis(p[t.name], 0, -1) for p in predictions]))
            result |= self._columns_of(t, values, distances, relative, coverage)
        relative = relative.mean(0)
        return result | {"domain_distance": relative, "outside_domain": (relative > 1).astype(int)}

    def _columns_of(self, target: Target, values, distances, relative, coverage):
        """Return the columns of a property from the predictions of the members."""
        name, mean, spread = target.name, values.mean(0), None
        scalar = target.kind == "scalar"
        result = {name: mean} if scalar else {f"{name}_{x}": mean[k] for k, x in enumerate("xyz")}
        if len(values) > 1:
            spread = values.std(0, ddof=1)  # of a vector, report the norm of its spread
            spread = spread if scalar else np.linalg.norm(spread, axis=0)
            result[f"{name}_std"] = spread
        expected = [d.expected_error(name, x) for d, x in zip(self.domains, distances)]
        result[f"{name}_expected_error"] = np.mean(expected, axis=0)
        if scalar:
            width = np.full(len(mean), np.nan)
            if self.intervals is not None:
                width = self.intervals.half_width(name, relative, spread, coverage)
            width = np.where(np.isfinite(width), width, np.nan)
            result |= {f"{name}_lower": mean - width, f"{name}_upper": mean + width}
        return result


def _load_intervals(paths: Sequence[str], names: Sequence[str]) -> EnsembleIntervals | None:
    """Return the intervals of scalar properties, or None if a predictor has none."""
    if not names:
        return None
    files = [Path(p) / interval_files.FILE for p in paths]
    missing = [str(path.parent) for path in files if not path.is_file()]
    if missing:
        log.warning(
            "no prediction intervals: %s has none. Rerun the command of its training, which only "
            "adds the file %s if the training is finished.",
            ", ".join(missing),
            interval_files.FILE,
        )
        return None
    return EnsembleIntervals.fit([ValidationErrors.load(path) for path in files], names)
