"""Cases of benchmarks/models.py: models of this package and of others, equally wide and deep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

OURS = "ours"
QUICK = ("painn", "schnet", "so3krates")


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
# elements of the drugs; models of other packages have weights for them only
ELEMENTS = [1, 6, 7, 8, 9, 16, 17]
NEIGHBORS = {"elements": ELEMENTS, "avg_num_neighbors": 20.0}
MACE = {
    "num_features": 64,
    "num_layers": 2,
    "num_radial": 8,
    "max_degree": 3,
    "feature_degree": 1,
    "correlation": 3,
}
AGNOSTIC = {"first_interaction": "agnostic"}  # as in peers/run_mace.py and in mlip
NEQUIP = {"num_features": 32, "num_layers": 4, "num_radial": 8, "max_degree": 2}
SEVENNET = NEQUIP | {"parity": "even", "self_connection": "linear"}
ALLEGRO = {
    "num_features": 64,
    "num_tensor_features": 32,
    "num_layers": 2,
    "num_radial": 8,
    "max_degree": 2,
}

PACE = {"num_features": 32, "num_layers": 2, "num_radial": 8, "feature_degree": 2}
EQUIFORMER = {"num_features": 128, "num_layers": 4, "num_radial": 32, "num_heads": 4}
FAENET = {"num_features": 128, "num_layers": 4, "num_radial": 50}
DIMENETPP = {"num_features": 128, "num_layers": 4, "num_radial": 6, "max_degree": 6}
COMENET = {"num_features": 256, "num_layers": 4, "num_radial": 3, "max_degree": 1}
COMPILED = {"compiled": True}  # torch.compile, in the mode of the package

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
    Case("mlip/mace", "mlip", "mace", MACE),
    Case("mace-torch/mace", "mace", "mace", MACE),
    Case("mace-torch/mace-compiled", "mace", "mace", MACE | COMPILED),
    Case("ours/mace", OURS, "mace", MACE | AGNOSTIC | NEIGHBORS, "mace-torch/mace"),
    Case("mlip/nequip", "mlip", "nequip", NEQUIP),
    Case("nequip/nequip", "nequip", "nequip", NEQUIP),
    Case("nequip/nequip-compiled", "nequip", "nequip", NEQUIP | COMPILED),
    Case("ours/nequip", OURS, "nequip", NEQUIP | NEIGHBORS, "nequip/nequip"),
    Case("nequip/allegro", "nequip", "allegro", ALLEGRO),
    Case("nequip/allegro-compiled", "nequip", "allegro", ALLEGRO | COMPILED),
    Case("ours/allegro", OURS, "allegro", ALLEGRO | NEIGHBORS, "nequip/allegro"),
    Case("sevenn/sevennet", "sevenn", "sevennet", SEVENNET),
    Case("ours/sevennet", OURS, "sevennet", SEVENNET | NEIGHBORS, "sevenn/sevennet"),
    Case("pyg/dimenetpp", "pyg", "dimenetpp", DIMENETPP),
    Case("ours/dimenetpp", OURS, "dimenetpp", DIMENETPP, "pyg/dimenetpp"),
    Case("faenet/faenet", "faenet", "faenet", FAENET),
    Case("ours/faenet", OURS, "faenet", FAENET, "faenet/faenet"),
    # the authors' code of these models is not on a package registry
    Case("ours/pace", OURS, "pace", PACE | NEIGHBORS),
    Case("ours/equiformer", OURS, "equiformer", EQUIFORMER),
    Case("ours/spherenet", OURS, "spherenet", DIMENETPP),
    Case("ours/comenet", OURS, "comenet", COMENET),
)


def is_ours(case: Case) -> bool:
    """Return whether a case is a model of this package."""
    return case.environment == OURS


def is_peer(case: Case) -> bool:
    """Return whether one of our models is compared with this case."""
    return any(c.peer == case.name for c in CASES)


def chosen(only: list[str], quick: bool = False) -> list[Case]:
    """Return the cases whose name contains one of the texts `only`.

    Without texts, return all cases. With `quick`, return our PaiNN, SchNet and So3krates without
    variants and their peers, because the others take most of the time.

    Raises:
      ValueError: No name contains one of the texts.
    """
    for text in only:
        if not any(text in case.name for case in CASES):
            raise ValueError(
                f"no case name contains {text!r}; cases: {', '.join(c.name for c in CASES)}"
            )
    if not only and quick:
        return [case for case in CASES if case.model in QUICK and "-spline" not in case.name]
    return [case for case in CASES if not only or any(text in case.name for text in only)]
