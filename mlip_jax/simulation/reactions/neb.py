"""Minimum-energy paths of reactions by batched nudged elastic bands."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.graphs.image_slots import ImageBudget, count_images
from mlip_jax.graphs.long_range import in_cells
from mlip_jax.graphs.neighbors import count_edges, long_range_list
from mlip_jax.graphs.shapes import NODE_MULTIPLE, round_up
from mlip_jax.graphs.slots import Slots
from mlip_jax.matmul_precision import full_precision
from mlip_jax.potential import Potential
from mlip_jax.simulation import user_warnings
from mlip_jax.simulation.calculators.conservation import already_warned, warn_if_not_conservative
from mlip_jax.simulation.device_memory import ProgramTooLarge, check_fits, largest_size
from mlip_jax.simulation.force_fields import TrustCheck, load_mean_force_field
from mlip_jax.simulation.reactions.band import Band, BandState, Paths, fits
from mlip_jax.simulation.reactions.paths import (
    INTERPOLATIONS,
    find_path_obstacle,
    interpolate_path,
    path_list,
)
from mlip_jax.simulation.relaxation import minimizers
from mlip_jax.simulation.relaxation.inputs import fixed_atoms
from mlip_jax.simulation.relaxation.pool import slot_size
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.simulation.shared_programs import kept_for_equal_arguments
from mlip_jax.structure import STATES, electronic_value

log = logging.getLogger(__name__)

# _SLACK: ratio of the edges of a budget to those of the first images.
_SLACK, _MULTIPLE = 1.2, 128
# Ends closer than this distance (Å) are the same structure.
_SAME_ENDS = 0.05
_BATCH_ATOMS = {"cpu": 640, "gpu": 16_384, "tpu": 16_384}


@dataclasses.dataclass(frozen=True)
class NEBOptions:
    """Options of a nudged elastic band; see `neb`."""

    num_images: int = 7
    interpolation: str = "idpp"
    relax_ends: bool = True
    climb: bool = True
    spring: float = 0.1
    optimizer: str = "bfgs"
    fmax: float = 0.05
    max_steps: int = 500
    maxstep: float = 0.2
    dtype: str = "float64"
    batch_atoms: int | None = None

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {INTERPOLATIONS}, received {self.interpolation!r}"
            )
        if self.num_images < 1 or self.max_steps < 1:
            raise ValueError("num_images and max_steps must be at least 1")
        if not (self.fmax > 0 and self.spring > 0):
            raise ValueError("fmax and spring must be positive")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f'dtype must be "float32" or "float64", received {self.dtype!r}')
        minimizers.create(self.optimizer, self.maxstep)


@dataclasses.dataclass(frozen=True)
class ReactionPath:
    """Path of a reaction.

    Attributes:
      images: Images from the first to the last one, with energies and forces; empty if the status
        is "failed".
      status: "converged", "step limit", "diverged" (a value is not finite) or "failed".
      reason: Reason for "failed"; otherwise "".
      steps: Number of steps.
      fmax: Largest force on the band (eV/Å).
    """

    images: list[Atoms]
    status: str
    reason: str = ""
    steps: int = 0
    fmax: float = math.nan

    @property
    def converged(self) -> bool:
        """Return whether the status is "converged"."""
        return self.status == "converged"

    @property
    def energies(self) -> np.ndarray:
        """Energies of the images (eV), (images,)."""
        return np.array([image.get_potential_energy() for image in self.images])

    @property
    def barrier(self) -> float:
        """Energy of the highest image minus that of the first one (eV); NaN without a path."""
        return float(self.energies.max() - self.energies[0]) if self.images else math.nan

    @property
    def reverse_barrier(self) -> float:
        """Energy of the highest image minus that of the last one (eV); NaN without a path."""
        return float(self.energies.max() - self.energies[-1]) if self.images else math.nan

    @property
    def reaction_energy(self) -> float:
        """Energy of the last image minus that of the first one (eV); NaN without a path."""
        return float(self.energies[-1] - self.energies[0]) if self.images else math.nan

    @property
    def remark(self) -> str:
        """Return a note if both ends are the same structure, which has no barrier, otherwise ""."""
        from ase.geometry import find_mic

        if not self.images:
            return ""
        first, last = self.images[0], self.images[-1]
        vectors, _ = find_mic(last.positions - first.positions, first.cell, first.pbc)
        if np.linalg.norm(vectors) > _SAME_ENDS:
            return ""
        return "the ends have relaxed to the same structure, so there is no barrier between them"

    @property
    def distances(self) -> np.ndarray:
        """Length of the path from the first image to each image (Å), (images,)."""
        from ase.geometry import find_mic

        lengths = [0.0]
        for a, b in zip(self.images, self.images[1:]):
            vectors, _ = find_mic(b.positions - a.positions, a.cell, a.pbc)
            lengths.append(float(np.linalg.norm(vectors)))
        return np.cumsum(lengths)


def neb(paths: Any, force_field: Any, **options: Any) -> list[ReactionPath]:
    """Find minimum-energy paths with nudged elastic bands; many paths are optimized in parallel.

    The steps are those of ase.mep.NEB with method="improvedtangent" and ASE's optimizers.

    >>> (path,) = neb([reactant, product], "runs/spice")  # doctest: +SKIP
    >>> path.status, path.barrier, path.images[4]  # doctest: +SKIP

    Args:
      paths: Paths, each a list of ase.Atoms: both ends, or all images.
      force_field: Force field in any form that `simulation.force_fields.load_mean_force_field` accepts.
      num_images: Number of images between the ends, unless a path has images.
      interpolation: "idpp" or "linear".
      relax_ends: Whether the ends are relaxed first, to `fmax`.
      climb: Whether the highest image climbs to the saddle point.
      spring: Force constant of the springs (eV/Å²).
      optimizer: "bfgs", "lbfgs" or "fire".
      fmax: Largest force on a converged band (eV/Å).
      max_steps: Maximum number of steps.
      maxstep: Longest step of an atom (FIRE: of all atoms together) (Å).
      dtype: "float32" or "float64".
      batch_atoms: Number of atoms, summed over the images that are evaluated together; None
        chooses by the kind of device.

    Returns:
      One result per path.

    Raises:
      ValueError: If an argument is invalid.
      CheckpointError: If there is no force field at this location.
    """
    settings, potential = NEBOptions(**options), load_mean_force_field(force_field)
    given = path_list(paths)
    results = dict(find_paths(dict(enumerate(given)), potential, settings))
    TrustCheck.load(force_field, potential).warn(
        [image for result in results.values() for image in result.images], "images"
    )
    for k, result in sorted(results.items()):
        if result.remark:
            user_warnings.warn(f"path {k}: {result.remark}")
    return [results[k] for k in range(len(given))]


def find_paths(
    given: Mapping[Any, Sequence[Atoms]], potential: Potential, settings: NEBOptions
) -> Iterator[tuple[Any, ReactionPath]]:
    """Yield (key, path) of paths, batch by batch.

    Warns with `NonConservativeWarning` if the forces are not the gradient of the energy: the
    highest image is then not at a saddle point of the energy.
    """
    warn_if_not_conservative([potential])
    usable = {}
    for key, path in given.items():
        reason = find_path_obstacle(path, potential)
        if reason:
            yield key, ReactionPath([], "failed", reason)
        else:
            usable[key] = list(path)
    if settings.relax_ends:
        for key, reason in _relax_ends(usable, potential, settings):
            del usable[key]
            yield key, ReactionPath([], "failed", reason)
    groups: dict[tuple[int, int, bool], dict[Any, list[Atoms]]] = {}
    for key, path in usable.items():
        images = interpolate_path(path, settings.num_images, settings.interpolation)
        kind = slot_size(len(images[0])), len(images), bool(images[0].pbc.any())
        groups.setdefault(kind, {})[key] = images
    atoms = settings.batch_atoms or _BATCH_ATOMS.get(jax.local_devices()[0].platform, 16_384)
    for (size, length, _), members in groups.items():
        count = max(atoms // (size * (length - 2)), 1)
        left, too_large = list(members), []
        while left:
            keys = left[:count]
            try:
                found = _optimize([members[key] for key in keys], size, potential, settings)
            except ProgramTooLarge as error:
                too_large.append((len(keys), error.needed))
                count = int(largest_size(too_large, error.available))
                log.warning(
                    "%s for %d paths in parallel; continuing with %d", error, len(keys), count
                )
                continue
            yield from zip(keys, found)
            left = left[len(keys) :]


def _relax_ends(usable, potential, settings) -> Iterator[tuple[Any, str]]:
    """Relax the ends of paths in place; yield (key, reason) of those that fail."""
    with already_warned():
        relaxer = Relaxer(
            potential, fmax=settings.fmax, max_steps=settings.max_steps, dtype=settings.dtype
        )
    ends = {(key, end): path[end] for key, path in usable.items() for end in (0, -1)}
    results = dict(relaxer.stream(ends.items()))
    for key, path in list(usable.items()):
        failed = [r for r in (results[key, 0], results[key, -1]) if not r.converged]
        if failed:
            yield key, f"an end cannot be relaxed: {failed[0].reason or failed[0].status}"
        else:
            path[0], path[-1] = results[key, 0].atoms, results[key, -1].atoms


def _optimize(
    batch: list[list[Atoms]], size: int, potential: Potential, settings: NEBOptions
) -> list[ReactionPath]:
    """Optimize paths of equal length with at most `size` atoms in one program.

    Raises:
      ProgramTooLarge: There are several paths, and the program needs more memory than the device
        has.
    """
    dtype = np.dtype(settings.dtype)
    band = Band(
        potential.model,
        potential.energy_scale,
        float(potential.cutoff),
        potential.long_range_cutoff,
        minimizers.create(settings.optimizer, settings.maxstep),
        settings.spring,
        settings.climb,
        settings.fmax,
        settings.max_steps,
    )
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), potential.params)
    origins = [path[0].positions.mean(0) for path in batch]
    with jax.enable_x64(dtype == np.float64), full_precision():
        ends = _end_results(batch, potential, settings)
        paths, positions = _pack(batch, origins, size, dtype)
        reference = [potential.reference_energies[path[0].numbers].sum() for path in batch]
        paths = paths._replace(end_energies=(ends - np.array(reference)[:, None]).astype(dtype))
        budget = _budget(batch, size, potential)
        state = band.init(positions)
        run = _shared_function(band)
        device = jax.local_devices()[0]
        while True:
            args = budget, params, paths, state, np.int32(10_000_000)
            if len(batch) > 1:
                check_fits(run, *args, device=device)
            state = run(*args)
            needed = np.asarray(state.needed)
            if bool(fits(budget, needed)):
                break
            budget = _enlarge(budget, needed)
        state = jax.device_get(state)
    return [
        _result(path, k, state, ends[k], origins[k], reference[k], settings)
        for k, path in enumerate(batch)
    ]


@kept_for_equal_arguments
def _shared_function(band: Band):
    """Return `band.run`, compiled once per budget for all batches and calls."""
    return jax.jit(band.run, static_argnums=0)


def _end_results(batch, potential, settings) -> np.ndarray:
    """Return the energies of both ends of each path (eV), (B, 2)."""
    with already_warned():
        relaxer = Relaxer(potential, max_steps=0, dtype=settings.dtype)
    ends = {(k, e): path[e] for k, path in enumerate(batch) for e in (0, -1)}
    results = dict(relaxer.stream(ends.items()))
    return np.array([[results[k, 0].energy, results[k, -1].energy] for k in range(len(batch))])


def _pack(batch, origins, size, dtype) -> tuple[Paths, np.ndarray]:
    """Return the paths, without energies, and the positions of their images as arrays."""
    num, inner = len(batch), len(batch[0]) - 2
    whole = np.zeros((num, inner + 2, size, 3), dtype)
    numbers, mobile = np.zeros((num, size), np.int32), np.zeros((num, size), bool)
    for k, path in enumerate(batch):
        n = len(path[0])
        whole[k, :, :n] = [image.positions - origins[k] for image in path]
        numbers[k, :n], mobile[k, :n] = path[0].numbers, True
        mobile[k, fixed_atoms(path[0])] = False
    states = (
        np.repeat(np.array([electronic_value(p[0], name) for p in batch], dtype), inner)
        for name in STATES
    )
    counts = np.repeat(np.array([len(p[0]) for p in batch], np.int32), inner)
    slots = Slots(np.repeat(numbers, inner, axis=0), counts, *states)
    cells = {}
    if batch[0][0].pbc.any():
        cells = {
            "cell": np.array([p[0].cell.complete().array for p in batch], dtype),
            "periodic": np.array([p[0].pbc for p in batch]),
        }
    paths = Paths(slots, whole[:, [0, -1]], np.zeros((num, 2), dtype), mobile, **cells)
    return paths, whole[:, 1:-1]


def _budget(batch, size: int, potential: Potential) -> ImageBudget:
    """Return the padding budget of all images."""
    edges = pairs = 0
    images = 1
    far = potential.long_range_cutoff
    for path in batch:
        box = (path[0].cell.complete().array, path[0].pbc) if path[0].pbc.any() else ()
        if box:
            images = max(images, count_images(*box, max(potential.cutoff, in_cells(far) or 0.0)))
        for image in path[1:-1]:
            edges += count_edges(image.positions, potential.cutoff, *box)
            if far is not None:
                pairs += len(long_range_list(image.positions, far, *box)[0])
    inner = len(batch[0]) - 2
    nodes = round_up(sum(len(path[0]) for path in batch) * inner + size + 1, NODE_MULTIPLE)
    return ImageBudget(
        nodes,
        round_up(max(_SLACK * edges, 2), _MULTIPLE),
        len(batch) * inner + 1,
        round_up(_SLACK * pairs, _MULTIPLE),
        images,
    )


def _enlarge(budget: ImageBudget, needed: np.ndarray) -> ImageBudget:
    """Return a larger budget for the needed edges, pairs and images."""
    return budget._replace(
        n_edge=max(budget.n_edge, round_up(_SLACK * needed[0], _MULTIPLE)),
        n_pair=max(budget.n_pair, round_up(_SLACK * needed[1], _MULTIPLE)),
        n_image=max(budget.n_image, int(needed[2])),
    )


def _result(path, k: int, state: BandState, ends, origin, reference, settings) -> ReactionPath:
    """Return the result of a path."""
    n, fmax, steps = len(path[0]), float(state.fmax[k]), int(state.steps[k])
    status = "converged" if fmax < settings.fmax else "step limit"
    if not np.isfinite(fmax):
        status = "diverged"
    images = []
    for i, image in enumerate(path):
        atoms = image.copy()
        inner = 0 < i < len(path) - 1
        if inner:
            positions = state.positions[k, i - 1, :n].astype(np.float64) + origin
            positions[fixed_atoms(path[0])] = image.positions[fixed_atoms(path[0])]
            atoms.set_positions(positions, apply_constraint=False)
            energy = reference + float(state.energies[k, i - 1])
            labels = {"forces": state.forces[k, i - 1, :n].astype(np.float64)}
        else:
            energy, labels = float(ends[0 if i == 0 else 1]), {}
        atoms.calc = SinglePointCalculator(atoms, energy=energy, **labels)
        images.append(atoms)
    return ReactionPath(images, status, "", steps, fmax)
