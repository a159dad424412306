"""Cases of benchmarks/models.py: models of this package and of others, equally wide and deep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

OURS = "ours"


class Case(NamedTuple):
    """Model of a package, one row of the tables.

    Attributes:
      name: Unique name, "PACKAGE/MODEL".
      environment: OURS, or a key of environments.ENVIRONMENTS.
      model: Name of the model in the package.
      options: Options of the model; for ours, fields of the class Model.
      peer: Name of the case to compare with, of the same architecture if possible; "" for none.
    """

    name: str
    environment: str
    model: str
    options: Mapping[str, Any]
    peer: str = ""


PAINN = {"num_features": 128, "num_layers": 3, "num_radial": 20}
SCHNET = PAINN
TRANSFORMER = {"num_features": 128, "num_layers": 8, "num_radial": 64, "num_heads": 8}
SO3KRATES = {
    "num_features": 132,
    "num_layers": 3,
    "num_radial": 32,
    "num_heads": 4,
    "degrees": [1, 2, 3],
}
SPLINE = {"radial_filter": "spline"}

CASES = (
    Case("schnetpack/painn", "spk", "painn", PAINN),
    Case("ours/painn", OURS, "painn", PAINN, "schnetpack/painn"),
    Case("schnetpack/schnet", "spk", "schnet", SCHNET),
    Case("ours/schnet", OURS, "schnet", SCHNET, "schnetpack/schnet"),
    Case("torchmd-net/et", "tmd", "equivariant-transformer", TRANSFORMER),
    Case(
        "ours/equivariant_transformer",
        OURS,
        "equivariant_transformer",
        TRANSFORMER,
        "torchmd-net/et",
    ),
    Case(
        "ours/equivariant_transformer-spline",
        OURS,
        "equivariant_transformer",
        TRANSFORMER | SPLINE,
        "torchmd-net/et",
    ),
    # mlff's So3krates is not on a package registry. SchNetPack's PaiNN is as fast.
    Case("ours/so3krates", OURS, "so3krates", SO3KRATES, "schnetpack/painn"),
    Case("ours/so3krates-spline", OURS, "so3krates", SO3KRATES | SPLINE, "schnetpack/painn"),
    Case(
        "torchmd-net/tensornet",
        "tmd",
        "tensornet",
        {"num_features": 128, "num_layers": 2, "num_radial": 32},
    ),
    Case("mlip/visnet", "mlip", "visnet", {"num_features": 128, "num_layers": 4, "num_radial": 32}),
    Case("mlip/mace", "mlip", "mace", {"num_features": 128, "num_layers": 2, "num_radial": 8}),
    Case(
        "mace-torch/mace", "mace", "mace", {"num_features": 128, "num_layers": 2, "num_radial": 8}
    ),
)


def is_ours(case: Case) -> bool:
    """Return whether a case is a model of this package."""
    return case.environment == OURS


def is_peer(case: Case) -> bool:
    """Return whether one of our models is compared with this case."""
    return any(c.peer == case.name for c in CASES)


def chosen(only: list[str], quick: bool = False) -> list[Case]:
    """Return the cases whose name contains one of the texts `only`.

    Without texts, return all cases. With `quick`, return our models without variants and their
    peers, except for the transformer with 8 layers, whose compilation takes half of the time.

    Raises:
      ValueError: No name contains one of the texts.
    """
    for text in only:
        if not any(text in case.name for case in CASES):
            raise ValueError(
                f"no case name contains {text!r}; cases: {', '.join(c.name for c in CASES)}"
            )
    if not only and quick:
        return [
            case
            for case in CASES
            if (is_peer(case) or is_ours(case) and "-spline" not in case.name)
            and case.options["num_layers"] < 8
        ]
    return [case for case in CASES if not only or any(text in case.name for text in only)]
