"""Equation of state of Birch and Murnaghan (third order), fitted by linear least squares.

The energy is a cubic polynomial of x = V^(-2/3).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ase.units import GPa


@dataclasses.dataclass(frozen=True)
class EquationOfState:
    """Fitted equation of state.

    Attributes:
      volume: Volume of the minimum (Å³).
      energy: Energy of the minimum (eV).
      bulk_modulus: Bulk modulus of the minimum (GPa).
      derivative: Derivative of the bulk modulus with respect to pressure.
      coefficients: Coefficients of the polynomial in (volume/V)^(2/3), highest power first.
      residual: Root mean square of the residuals (eV).
    """

    volume: float
    energy: float
    bulk_modulus: float
    derivative: float
    coefficients: tuple[float, ...]
    residual: float

    def energies(self, volumes: np.ndarray) -> np.ndarray:
        """Return the energies (eV) at volumes (Å³)."""
        return np.polyval(self.coefficients, (self.volume / np.asarray(volumes)) ** (2 / 3))


def fit_equation_of_state(volumes: np.ndarray, energies: np.ndarray) -> EquationOfState:
    """Fit volumes (Å³) and energies (eV).

    >>> volumes = np.linspace(38, 42, 5)
    >>> round(fit_equation_of_state(volumes, 0.01 * (volumes - 40) ** 2).volume, 2)
    40.0

    Raises:
      ValueError: There are fewer than five finite points, or the energy has no minimum within the
        volumes.
    """
    volumes, energies = np.asarray(volumes, float), np.asarray(energies, float)
    known = np.isfinite(volumes) & np.isfinite(energies)
    if known.sum() < 5:
        raise ValueError(f"an equation of state requires 5 volumes, received {known.sum()}")
    volumes, energies = volumes[known], energies[known]
    scale, level = float(np.median(volumes)), float(energies.min())
    x = (scale / volumes) ** (2 / 3)  # of the order of 1, so that the fit is well conditioned
    polynomial = np.polyfit(x - 1, energies - level, 3)
    slope = np.polyder(polynomial)
    roots = np.roots(slope)
    minima = [
        r.real for r in roots if abs(r.imag) < 1e-9 and np.polyval(np.polyder(slope), r.real) > 0
    ]
    inside = [r for r in minima if x.min() - 1 <= r <= x.max() - 1]
    if not inside:
        raise ValueError(
            f"the energy has no minimum between {volumes.min():.4g} and {volumes.max():.4g} Å³"
        )
    minimum = 1 + inside[0]
    volume = scale * minimum**-1.5
    second = np.polyval(np.polyder(polynomial, 2), inside[0])
    third = np.polyval(np.polyder(polynomial, 3), inside[0])
    # derivatives of x with respect to the volume at the minimum
    xv, xvv = -2 / 3 * minimum / volume, 10 / 9 * minimum / volume**2
    curvature = second * xv**2
    change = third * xv**3 + 3 * second * xv * xvv
    # shift and scale the argument from x - 1 to (volume / V)^(2/3) = x / minimum
    argument = np.poly1d([minimum, -1])
    coefficients = np.poly1d(polynomial)(argument).coefficients
    coefficients[-1] += level
    residuals = np.polyval(polynomial, x - 1) + level - energies
    return EquationOfState(
        float(volume),
        float(np.polyval(polynomial, inside[0]) + level),
        float(volume * curvature / GPa),
        float(-1 - volume * change / curvature),
        tuple(coefficients.tolist()),
        float(np.sqrt(np.mean(residuals**2))),
    )
