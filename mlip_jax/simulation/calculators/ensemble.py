"""ASE calculator of several force fields: their mean, and their standard deviation as a sign of how far to trust it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.potential import Evaluation, Potential, evaluate, hessian_columns
from mlip_jax.simulation.calculators.padded import PaddedCalculator
from mlip_jax.simulation.trust.ensemble_calibration import Calibration


class _ArchitectureGroup(NamedTuple):
    """Members of one architecture: one model, and parameters one upon another."""

    model: nn.Module
    places: tuple[int, ...]


class EnsembleCalculator(PaddedCalculator):
    """Mean and spread over force fields that were trained with other seeds, on other data, or are other models.

    Properties and their units are those of MLIPCalculator; each is the mean over the members, and so are the Hessian
    and what comes of it. Beside each of them but free_energy `results` has its standard deviation over the
    members (of a sample: n - 1) in the same unit and shape, for every component by itself: energy_std (), energies_std
    (n_atoms,), forces_std (n_atoms, 3), stress_std (6,). `calc.results["forces_std"]` or
    `calc.get_property("forces_std", atoms)` gives them. Where all members predict partial charges there are charges,
    dipole and their deviations.

    A standard deviation over members is not the error to expect, but grows with it. With a calibration (made by
    configs/ensemble.py) there are also energy_expected_error (eV) and forces_expected_error (n_atoms,) in eV/Å, of each
    component of an atom's force: standard deviations of the error of the mean, by structures held out from training.

    The members are one program: it is compiled once for each size, however many there are, and those of one
    architecture are evaluated side by side. An element must be known to all of them.

    Attributes:
      potentials: The members, parameters on the host. calibration: Theirs, or None.
      dtype, num_compiles, implemented_properties, predictions: As for MLIPCalculator; predictions are means.
    """

    def __init__(self, potentials: Iterable[Potential], dtype: str = "float32",
                 calibration: Calibration | None = None):
        """
        Args:
          potentials: Two or more, of one cutoff and one long-range cutoff.
          dtype: "float32" or "float64".
          calibration: Of these members.

        Raises:
          ValueError: Fewer than two members, other cutoffs, another dtype, or a calibration of other members.
        """
        potentials = tuple(potentials)
        if len(potentials) < 2:
            raise ValueError(f"an ensemble needs two or more force fields, received {len(potentials)}; MLIPCalculator "
                             "is for one")
        cutoffs = [(p.cutoff, p.long_range_cutoff) for p in potentials]
        if len(set(cutoffs)) > 1:
            raise ValueError("members of an ensemble share one neighbour list and must have one cutoff and one "
                             f"long-range cutoff; received (in Å) {', '.join(map(str, cutoffs))}")
        if calibration is not None:
            calibration.check(potentials)
        super().__init__(potentials, dtype)
        self.calibration = calibration
        self.potentials = self._members
        self._groups = _grouped(self.potentials)
        with_deviation = [name for name in self.implemented_properties if name != "free_energy"]
        self.implemented_properties = [*self.implemented_properties, *(f"{name}_std" for name in with_deviation),
                                       *(calibration.properties() if calibration is not None else ())]

    @classmethod
    def from_workdirs(cls, paths: Sequence[str | Path], dtype: str = "float32",
                      calibration: str | Path | None = None) -> EnsembleCalculator:
        """The ensemble of several training runs' directories.

        Args:
          calibration: ensemble.json of these members, or the folder that holds it.

        Raises:
          CheckpointError: Nothing readable is in one of them.
          FileNotFoundError: The calibration is not there.
          ValueError: See `__init__`; or one path in place of a list of them.
        """
        if isinstance(paths, str | Path):
            raise ValueError(f"expected a list of workdirs, received one path, {str(paths)!r}")
        known = None if calibration is None else Calibration.load(calibration)
        return cls([Potential.load(path) for path in paths], dtype, known)

    def _params(self):
        """For each group its parameters and energy scales (M,), stacked along a leading axis."""
        stacked = []
        for group in self._groups:
            members = [self.potentials[place] for place in group.places]
            scales = np.array([m.energy_scale for m in members], self.dtype)
            stacked.append((jax.tree.map(lambda *leaves: np.stack(leaves), *(m.params for m in members)), scales))
        return stacked

    def _over_members(self, function, params) -> list[Any]:
        """function(model, params, energy_scale) of each group; every leaf has the group's members along axis 0."""
        return [jax.vmap(lambda p, scale, model=group.model: function(model, p, scale))(*own)
                for group, own in zip(self._groups, params)]

    def _evaluate(self, params, graph, with_stress):
        def one(model, own, scale):
            out = evaluate(model, own, graph, scale, with_stress)
            return out._replace(properties={name: out.properties[name] for name in self._predicted})

        made: list[Evaluation] = self._over_members(one, params)
        back = np.argsort([place for group in self._groups for place in group.places])
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[back], *made)

    def _hessian_columns(self, params, graph, directions):
        def one(model, own, scale):
            return hessian_columns(model, own, graph, scale, directions)

        return sum(made.sum(axis=0) for made in self._over_members(one, params)) / len(self.potentials)

    def _results(self, atoms, positions, out, stress):
        stresses = [None] * len(out) if stress is None else stress
        made, predictions = zip(*(self._results_of(p, atoms, positions, o, s)
                                  for p, o, s in zip(self.potentials, out, stresses)))
        self.predictions = {name: np.mean([p[name] for p in predictions], axis=0) for name in self._predicted}
        results = {}
        for name in made[0]:
            values = np.array([own[name] for own in made])
            results[name] = _plain(values.mean(axis=0))
            if name != "free_energy":
                results[f"{name}_std"] = _plain(values.std(axis=0, ddof=1))
        if self.calibration is not None:
            results |= self.calibration.results(results["energy_std"], results["forces_std"])
        return results


def _grouped(potentials: Sequence[Potential]) -> tuple[_ArchitectureGroup, ...]:
    """Members whose models and shapes of parameters are the same stand together."""
    groups: list[tuple[Any, list[int]]] = []
    for place, potential in enumerate(potentials):
        kind = potential.model, jax.tree.map(np.shape, potential.params)
        for known, places in groups:
            if known == kind:
                places.append(place)
                break
        else:
            groups.append((kind, [place]))
    return tuple(_ArchitectureGroup(kind[0], tuple(places)) for kind, places in groups)


def _plain(value):
    return float(value) if np.ndim(value) == 0 else value
