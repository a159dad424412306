"""What benchmarks/models.py compares: models of this package and of others, at the same width, depth and basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

OURS = "ours"


class Case(NamedTuple):
    """One row.

    Attributes:
      name: "<who>/<model>", unique. environment: OURS, or one of environments.ENVIRONMENTS.
      model: What it is called there. options: Of the model; of ours, fields of the class Model.
      peer: Name of the case that it is compared with, of the same architecture where there is one; "" for none.
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
MACE = {"num_features": 128, "num_layers": 2, "num_radial": 8}
# what run_mace.py gives mace-torch: scalars between the layers, elements of the drugs
OUR_MACE = MACE | {
    "feature_degree": 0,
    "first_interaction": "agnostic",
    "elements": [1, 6, 7, 8, 9, 16, 17],
}

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
    # mlff's So3krates is on no package registry; SchNetPack's PaiNN, measured beside it, is as fast
    Case("ours/so3krates", OURS, "so3krates", SO3KRATES, "schnetpack/painn"),
    Case("ours/so3krates-spline", OURS, "so3krates", SO3KRATES | SPLINE, "schnetpack/painn"),
    Case(
        "torchmd-net/tensornet",
        "tmd",
        "tensornet",
        {"num_features": 128, "num_layers": 2, "num_radial": 32},
    ),
    Case("mlip/visnet", "mlip", "visnet", {"num_features": 128, "num_layers": 4, "num_radial": 32}),
    Case("mlip/mace", "mlip", "mace", MACE),
    Case("mace-torch/mace", "mace", "mace", MACE),
    Case("ours/mace", OURS, "mace", OUR_MACE, "mace-torch/mace"),
)


def is_ours(case: Case) -> bool:
    return case.environment == OURS


def is_peer(case: Case) -> bool:
    """Whether a case of ours is compared with it; the others are there for orientation."""
    return any(c.peer == case.name for c in CASES)


def chosen(only: list[str], quick: bool = False) -> list[Case]:
    """The cases whose name has one of the texts `only` in it.

    Without any: all, or, to be `quick`, ours without variants and their peers, and not the transformer of 8 layers,
    which takes half of the time to compile.

    Raises:
      ValueError: A text is in no name.
    """
    for text in only:
        if not any(text in case.name for case in CASES):
            raise ValueError(
                f"no case has {text!r} in its name; there are {', '.join(c.name for c in CASES)}"
            )
    if not only and quick:
        return [
            case
            for case in CASES
            if (is_peer(case) or is_ours(case) and "-spline" not in case.name)
            and case.options["num_layers"] < 8
        ]
    return [case for case in CASES if not only or any(text in case.name for text in only)]
