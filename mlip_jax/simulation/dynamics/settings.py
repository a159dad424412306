"""Settings of molecular dynamics: ensemble, time step, thermostat, records and limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from ase import units

from mlip_jax.potential import NO_ENERGY_DERIVATIVES, Potential, has_energy_derivatives
from mlip_jax.simulation.dynamics import integrators

BAR = 1e5 * units.Pascal  # in eV/Å³


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run. Times are in fs, temperatures in K, lengths in Å.

    Attributes:
      ensemble: "nve": constant energy. "langevin": constant temperature by friction and noise
        (BAOAB). "rescaling": constant temperature by stochastic velocity rescaling, which disturbs
        the motion least. "npt": constant pressure and temperature by stochastic cell rescaling, for
        cells that are periodic in all directions.
      timestep: Time step (fs); 0.5 if hydrogens move freely.
      temperature: Temperature of the thermostat and of the start (K).
      initial_temperature: Temperature of the start (K), if different.
      draw_momenta: Whether to draw momenta also for molecules that already have some. Otherwise these
        molecules start with their own, minus the motion of the center of mass if `fix_com`.
      friction: Friction coefficient of "langevin" (1/fs).
      thermostat_time: Relaxation time of the thermostat of "rescaling" and "npt" (fs).
      pressure: Target pressure of "npt" (bar).
      barostat_time: Relaxation time of the barostat of "npt" (fs).
      compressibility: Estimate of the compressibility (1/bar), by default that of water. The mean
        volume does not depend on it.
      fix_com: Whether to remove the motion of the center of mass.
      fix_rotation: Whether to remove the rotation of open molecules at the start.
      record_every: Steps between rows of energies and temperatures.
      frame_every: Steps between frames; 0 records none.
      skin: Distance by which neighbor lists exceed the cutoff (Å). Lists are rebuilt when an atom
        has moved by half of it.
      stop_on_bond_break: Whether to stop a molecule when one of its bonds breaks.
      bond_range: Range of the lengths of initially bonded pairs, relative to the sum of their
        covalent radii.
      max_temperature: Temperature above which a molecule counts as broken (K); None: ten times the
        temperature, at least 5000.
      dtype: "float32" or "float64".
      seed: Seed of the initial momenta and of the noise.
      allow_nonconservative: Whether to accept a force field whose forces are not the gradient of
        its energy. No energy is then conserved, and averages are not those of an ensemble.
    """

    ensemble: str = "langevin"
    timestep: float = 0.5
    temperature: float = 300.0
    initial_temperature: float | None = None
    draw_momenta: bool = False
    friction: float = 0.01
    thermostat_time: float = 100.0
    pressure: float = 1.01325
    barostat_time: float = 1000.0
    compressibility: float = 4.6e-5
    fix_com: bool = True
    fix_rotation: bool = True
    record_every: int = 20
    frame_every: int = 200
    skin: float = 0.4
    stop_on_bond_break: bool = True
    bond_range: tuple[float, float] = (0.5, 1.5)
    max_temperature: float | None = None
    dtype: str = "float32"
    seed: int = 0
    allow_nonconservative: bool = False

    def __post_init__(self):
        """Check the values.

        Raises:
          ValueError: If a value is invalid.
        """
        if self.ensemble not in INTEGRATORS:
            raise ValueError(
                f"ensemble must be one of {', '.join(INTEGRATORS)}, received {self.ensemble!r}"
            )
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f'dtype must be "float32" or "float64", received {self.dtype!r}')
        for name in ("timestep", "thermostat_time", "barostat_time", "compressibility", "skin"):
            self._check(name, getattr(self, name), 0, open_end=True)
        for name in ("temperature", "friction"):
            self._check(name, getattr(self, name), 0)
        for name in ("initial_temperature", "max_temperature"):
            if getattr(self, name) is not None:
                self._check(name, getattr(self, name), 0)
        if not np.isfinite(self.pressure):
            raise ValueError(f"pressure must be finite (bar), received {self.pressure}")
        for name, min_value in (("record_every", 1), ("frame_every", 0), ("seed", 0)):
            value = getattr(self, name)
            if int(value) != value or value < min_value:
                raise ValueError(
                    f"{name} must be an integer of at least {min_value}, received {value}"
                )
        low, high = self.bond_range
        if not 0 <= low < 1 < high:
            raise ValueError(
                f"bond_range must be a number below 1 and one above it, received {self.bond_range}"
            )

    @staticmethod
    def _check(name, value, min_value, open_end=False):
        """Raise ValueError if a value is not finite or below its minimum."""
        if not np.isfinite(value) or value < min_value or open_end and value == min_value:
            relation = "more than" if open_end else "at least"
            raise ValueError(f"{name} must be {relation} {min_value}, received {value}")

    def check_forces(self, potential: Potential) -> None:
        """Raise ValueError if the forces of a force field are unsuitable for these dynamics."""
        if not potential.conservative and not self.allow_nonconservative:
            raise ValueError(
                "the forces of this force field are not the gradient of its energy (they are "
                f"{potential.origin_of_forces}), so dynamics conserve no energy and sample no "
                "ensemble. To run them nevertheless, set allow_nonconservative=True "
                "(--config.allow_nonconservative=True)"
            )
        if self.ensemble == "npt" and not has_energy_derivatives(potential.model):
            message = NO_ENERGY_DERIVATIVES.format(what='stress, which ensemble "npt" requires')
            raise ValueError(message)

    def integrator(self) -> integrators.Verlet:
        """Return the integrator of the ensemble, in ASE's units."""
        return INTEGRATORS[self.ensemble](self)

    def broken_above(self, temperature: float) -> float:
        """Return the temperature above which a molecule counts as broken (K).

        Args:
          temperature: Temperature of its thermostat (K).
        """
        warmest = max(temperature, self.initial_temperature or 0.0)
        return max(10 * warmest, 5000.0) if self.max_temperature is None else self.max_temperature


INTEGRATORS: dict[str, Callable[[Settings], integrators.Verlet]] = {
    "nve": lambda s: integrators.Verlet(s.fix_com),
    "langevin": lambda s: integrators.Langevin(s.fix_com, s.friction / units.fs),
    "rescaling": lambda s: integrators.Rescaling(s.fix_com, s.thermostat_time * units.fs),
    "npt": lambda s: integrators.CellRescaling(
        s.fix_com,
        s.thermostat_time * units.fs,
        s.pressure * BAR,
        s.barostat_time * units.fs,
        s.compressibility / BAR,
    ),
}
