"""Published parameters of the D3 dispersion correction with Becke-Johnson damping, D3(BJ)."""

from __future__ import annotations

from typing import NamedTuple

from mlip_jax.config import unknown_name


class D3Parameters(NamedTuple):
    """Parameters of a functional.

    Attributes:
      s6, s8: Factors of the terms with C6 and C8.
      a1: Factor of the radius sqrt(C8 / C6) in the damping.
      a2: Length added to it (bohr).
    """

    s6: float
    s8: float
    a1: float
    a2: float


# Sources: (1) Grimme, Ehrlich and Goerigk, J. Comput. Chem. 32, 1456 (2011). (2) Goerigk and Grimme,
# Phys. Chem. Chem. Phys. 13, 6670 (2011). (3) Ehlert et al., J. Chem. Phys. 154, 061101 (2021).
# (4) Brandenburg et al., Phys. Rev. B 94, 115144 (2016). (5) Najibi and Goerigk, J. Chem. Theory
# Comput. 14, 5725 (2018). (6) Moellmann and Grimme, J. Phys. Chem. C 118, 7615 (2014). (7) Bursch
# et al., J. Chem. Phys. 156, 134105 (2022). Those of rpbe and wb97x have no publication of their
# own and are as in Grimme's programs.
FUNCTIONALS = {
    "pbe": D3Parameters(1.0, 0.7875, 0.4289, 4.4407),  # 1
    "rpbe": D3Parameters(1.0, 0.8318, 0.1820, 4.0094),
    "revpbe": D3Parameters(1.0, 2.3550, 0.5238, 3.5016),  # 1
    "pbesol": D3Parameters(1.0, 2.9491, 0.4466, 6.1742),  # 2
    "r2scan": D3Parameters(1.0, 0.78981345, 0.49484001, 5.73083694),  # 3
    "rscan": D3Parameters(1.0, 1.08859014, 0.47023427, 5.73408312),  # 3
    "scan": D3Parameters(1.0, 0.0, 0.538, 5.42),  # 4
    "tpss": D3Parameters(1.0, 1.9435, 0.4535, 4.4752),  # 1
    "tpssh": D3Parameters(1.0, 2.2382, 0.4529, 4.6550),  # 2
    "blyp": D3Parameters(1.0, 2.6996, 0.4298, 4.2359),  # 1
    "bp86": D3Parameters(1.0, 3.2822, 0.3946, 4.8516),  # 1
    "b97d": D3Parameters(1.0, 2.2609, 0.5545, 3.2297),  # 1
    "b3lyp": D3Parameters(1.0, 1.9889, 0.3981, 4.4211),  # 1
    "pbe0": D3Parameters(1.0, 1.2177, 0.4145, 4.8593),  # 1
    "hse06": D3Parameters(1.0, 2.3100, 0.3830, 5.6850),  # 6
    "r2scanh": D3Parameters(1.0, 1.1236, 0.4709, 5.9157),  # 7
    "camb3lyp": D3Parameters(1.0, 2.0674, 0.3708, 5.4743),  # 2
    "pw6b95": D3Parameters(1.0, 0.7257, 0.2076, 6.3750),  # 2
    "hf": D3Parameters(1.0, 0.9171, 0.3385, 2.8830),  # 1
    "wb97x": D3Parameters(1.0, 0.2641, 0.0, 5.4959),
    "wb97m": D3Parameters(1.0, 0.3908, 0.5660, 3.1280),  # 5
    "b97m": D3Parameters(1.0, 0.1384, -0.0780, 5.5946),  # 5
}


def parameters_of(functional: str) -> D3Parameters:
    """Return the parameters of a functional; case, hyphens, underscores and "(BJ)" do not matter.

    >>> parameters_of("PBE") == parameters_of("pbe-d3(bj)")
    True

    Raises:
      ValueError: Unknown functional; the message lists the known ones.
    """
    name = "".join(c for c in str(functional).lower().replace("ω", "w") if c.isalnum())
    for suffix in ("d3bj", "d3"):
        name = name if name in FUNCTIONALS else name.removesuffix(suffix)
    if name not in FUNCTIONALS:
        raise ValueError(unknown_name("functional of D3", functional, FUNCTIONALS))
    return FUNCTIONALS[name]
