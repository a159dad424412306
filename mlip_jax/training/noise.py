"""Displaced training inputs: noise, or frames of relaxations, drawn again in every epoch.

Geometry fine-tuning (Fu et al., arXiv:2507.00407, section 2.4) makes a property predictor robust to
geometries that a force field has relaxed. Half of its inputs are reference geometries with noise.
The other half are random frames of trajectories that end there. The predictor also learns the
displacement of each atom from its reference position.

One sign convention holds for both halves: displacement = reference - input (Å), per atom. The
reference is first superposed on the input by a rotation and a translation, which no model could
predict.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mlip_jax.datasets.columns import Columns, Rows
from mlip_jax.datasets.quality.geometry import superpose
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.graphs.edge_counts import count_all
from mlip_jax.graphs.shapes import PaddingBudget, Sizes
from mlip_jax.models.layers.readouts import DISPLACEMENT

# Noise can add edges to a structure. Batches are planned for a factor _EDGE_FACTOR of the edges and
# for at least _MIN_EXTRA_EDGES additional ones. If a batch is too small, its noise is drawn again,
# at most _MAX_TRIES times.
_EDGE_FACTOR, _MIN_EXTRA_EDGES, _MAX_TRIES = 1.05, 8, 20


@dataclasses.dataclass(frozen=True)
class AlternativeGeometries:
    """Other geometries of samples. Sample s has the rows index[first[s]:first[s + 1]] of `rows`."""

    rows: Rows
    index: np.ndarray
    first: np.ndarray


@dataclasses.dataclass(frozen=True)
class CoordinateNoise:
    """Generator of displaced inputs.

    An input is a pure function of (seed, epoch, sample), unless its batch has to be drawn again.

    Attributes:
      noise: Standard deviation of each coordinate (Å).
      cutoff: Cutoff radius of the edges that must fit into a batch (Å).
      seed: Seed of all random choices.
      share: Fraction of the inputs that are frames, for samples that have frames.
      frames: Frames of the samples. None: only noise.
      heavy: Whether only heavy atoms are superposed, and inputs are rotated at random, as for a
        model of bonds that depends on the orientation.
    """

    noise: float
    cutoff: float
    seed: int
    share: float = 0.0
    frames: AlternativeGeometries | None = None
    heavy: bool = False

    def __call__(
        self, columns: Columns, samples: np.ndarray, epoch: int, budget: PaddingBudget | None = None
    ) -> Columns:
        """Return the displaced samples, with their displacements (A, 3) as an atom property.

        Args:
          columns: Samples at their reference geometries.
          samples: Indices of the samples.
          epoch: Epoch, which selects the random numbers.
          budget: Padded size of the batch that the samples must fit into. None: any size.

        Raises:
          DatasetError: A frame has other atoms than its sample.
          ValueError: No draw fits into the budget.
        """
        for attempt in range(_MAX_TRIES):
            displaced = self._draw(columns, samples, epoch, attempt)
            if budget is None or count_all(displaced, self.cutoff).sum() <= budget.n_edge:
                return displaced
        raise ValueError(
            f"{len(samples)} structures with noise of {self.noise} Å do not fit into "
            f"{budget.n_edge} edges after {_MAX_TRIES} tries. Lower align.noise."
        )

    def bounds(self, sizes: Sizes, frame_edges: np.ndarray | None = None) -> Sizes:
        """Return upper estimates of the sizes of the inputs, for the planning of batches.

        Args:
          sizes: Sizes of the samples at their reference geometries.
          frame_edges: Number of edges of each frame, in the order of frames.index.
        """
        edges = (
            np.maximum(np.ceil(sizes.n_edge * _EDGE_FACTOR), sizes.n_edge + _MIN_EXTRA_EDGES)
            if self.noise
            else sizes.n_edge
        )
        # all pairs of atoms are an upper bound, except in small cells, whose atoms have several
        # images within the cutoff
        pairs = sizes.n_node * (sizes.n_node - 1)
        edges = np.where(sizes.n_edge > pairs, edges, np.minimum(edges, pairs)).astype(np.int64)
        if self.frames is not None and len(self.frames.index):
            sample = np.repeat(np.arange(len(edges)), np.diff(self.frames.first))
            np.maximum.at(edges, sample, frame_edges)
        return sizes._replace(n_edge=edges)

    def _draw(self, columns, samples, epoch, attempt):
        """Return one draw of the displaced samples."""
        from scipy.spatial.transform import Rotation  # slow to import

        positions, displacement = np.array(columns.positions), np.zeros_like(columns.positions)
        for s, sample in enumerate(samples.tolist()):
            # epoch + 1, because the seed must not be negative and validations use the epoch -1
            rng = np.random.default_rng([self.seed, epoch + 1, sample, attempt])
            atoms = slice(columns.offsets[s], columns.offsets[s + 1])
            reference = columns.positions[atoms]
            frame = self._frame(sample, columns.numbers[atoms], rng)
            positions[atoms] = (
                reference + self.noise * rng.normal(size=reference.shape)
                if frame is None
                else frame
            )
            mask = self._superposition_mask(columns.numbers[atoms])
            if self.heavy:
                rotation = Rotation.random(random_state=rng).as_matrix()
                positions[atoms] = positions[atoms] @ rotation
            displacement[atoms] = superpose(reference, positions[atoms], mask) - positions[atoms]
        return dataclasses.replace(
            columns,
            positions=positions,
            atom_properties={**columns.atom_properties, DISPLACEMENT: displacement},
        )

    def _superposition_mask(self, numbers) -> np.ndarray | None:
        """Return a mask of the atoms that are superposed, None for all."""
        mask = numbers > 1
        return mask if self.heavy and mask.any() else None

    def _frame(self, sample, numbers, rng):
        """Return the positions of a random frame of the sample, or None if it gets noise."""
        frames = self.frames
        if frames is None or rng.random() >= self.share:
            return None
        rows = frames.index[frames.first[sample] : frames.first[sample + 1]]
        if not len(rows):
            return None
        frame = frames.rows.take(rows[rng.integers(len(rows))][None], labels_only=True)
        if not np.array_equal(frame.numbers, numbers):
            raise DatasetError(
                f"record {int(frame.record[0])}: the atoms of its frames, or their order, differ "
                "from those of the geometry that the property belongs to"
            )
        return frame.positions


@dataclasses.dataclass(frozen=True)
class NoisedRows:
    """Rows of samples with a fixed displacement, for validation.

    Attributes:
      samples: Rows at the reference geometries.
      noise: Generator of the displacements.
    """

    samples: Rows
    noise: CoordinateNoise

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns:
        """Return the rows at `indices`, displaced as in an epoch before the first one."""
        indices = np.asarray(indices)
        return self.noise(self.samples.take(indices, labels_only=labels_only), indices, -1)
