"""Initial paths of nudged elastic bands: checks and interpolation on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation.inputs import find_obstacle
from mlip_jax.structure import STATES, electronic_value

INTERPOLATIONS = ("idpp", "linear")


def path_list(paths: Any) -> list[list[Atoms]]:
    """Return paths as lists of at least two images; a single path counts as a list of one.

    Raises:
      ValueError: Another object.
    """
    items = list(paths) if isinstance(paths, Iterable) else [paths]
    if items and all(isinstance(item, Atoms) for item in items):
        items = [items]
    for item in items:
        if isinstance(item, Atoms) or not isinstance(item, Sequence) or len(item) < 2:
            raise ValueError(
                "paths: expected lists of at least two ase.Atoms, from the first end to the last; "
                f"received {item!r}"
            )
    return [list(item) for item in items]


def find_path_obstacle(path: Sequence[Atoms], potential: Potential) -> str:
    """Return the reason why a path cannot be optimized, or ""."""
    first = path[0]
    for number, image in enumerate(path):
        reason = find_obstacle(image, potential, constraints=(FixAtoms,))
        if reason:
            return f"image {number}: {reason}"
        if not np.array_equal(image.numbers, first.numbers):
            return f"image {number} has other atoms than the first one, or another order of them"
        if any(electronic_value(image, name) != electronic_value(first, name) for name in STATES):
            return f"image {number} has another charge or number of unpaired electrons"
        if not (
            np.array_equal(image.pbc, first.pbc)
            and np.allclose(image.cell.array, first.cell.array, atol=1e-6)
        ):
            return f"image {number} has another cell than the first one"
    return ""


def interpolate_path(
    path: Sequence[Atoms], num_images: int, interpolation: str = "idpp"
) -> list[Atoms]:
    """Return a path with `num_images` images between its ends. One with images is kept.

    The images have no momenta, which would be those of other geometries.

    Args:
      path: Two ends, or a whole path.
      num_images: Number of images between the ends.
      interpolation: "idpp" (image-dependent pair potential) or "linear".
    """
    from ase.build import minimize_rotation_and_translation
    from ase.mep import NEB

    path = [image.copy() for image in path]
    for image in path:
        image.arrays.pop("momenta", None)
    if len(path) > 2:
        return path
    first, last = path
    if not first.pbc.any() and not first.constraints:
        minimize_rotation_and_translation(first, last)
    images = [first, *(first.copy() for _ in range(num_images)), last]
    band = NEB(images, method="improvedtangent")
    band.interpolate(interpolation, mic=bool(first.pbc.any()), apply_constraint=False)
    for image in images:
        image.calc = None
    return images
