"""Training inputs off the geometry that labels belong to: noise, and frames of relaxations, anew in each epoch.

Geometry fine-tuning (Fu et al., arXiv:2507.00407, section 2.4) teaches a property predictor to live with geometries
that a force field has relaxed: half of its inputs are reference geometries with noise, half random frames of
trajectories that lead there, and each atom also learns which way the reference geometry lies.

There is one sign convention, for both halves: displacement = reference - input, in Å, of each atom, once the reference
has been laid over the input (turned and moved; no model can know more).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mlip_jax.datasets.columns import Columns, Rows
from mlip_jax.datasets.quality.geometry import superpose
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.graphs.edge_counts import count_all
from mlip_jax.graphs.shapes import PaddingBudget, Sizes

DISPLACEMENT = "displacement"
# Room that is planned for edges which noise adds to a structure; what a batch does not hold is drawn again.
_MORE, _AT_LEAST, _TRIES = 1.05, 8, 20


@dataclasses.dataclass(frozen=True)
class AlternativeGeometries:
    """Other geometries of samples: those of sample s are index[first[s]:first[s + 1]] of rows."""

    rows: Rows
    index: np.ndarray
    first: np.ndarray


@dataclasses.dataclass(frozen=True)
class CoordinateNoise:
    """Makes inputs of samples: a pure function of (seed, epoch, sample), but where a batch is drawn again.

    Attributes:
      noise: Standard deviation of each coordinate, Å. share: Of inputs that are frames, where a sample has some.
      cutoff: Å, of the edges that must fit into a batch. seed: Of all that is drawn. frames: None for noise alone.
    """

    noise: float
    cutoff: float
    seed: int
    share: float = 0.0
    frames: AlternativeGeometries | None = None

    def __call__(self, columns: Columns, samples: np.ndarray, epoch: int, budget: PaddingBudget | None = None
                 ) -> Columns:
        """The samples with other positions, and their displacements (A, 3) as an atom property.

        Args:
          columns: Of the samples, at their reference geometries. samples: Their numbers.
          budget: Of the batch that they must fit into.

        Raises:
          DatasetError: A frame is of other atoms than its sample.
          ValueError: Nothing that was drawn fits into the budget.
        """
        for attempt in range(_TRIES):
            made = self._drawn(columns, samples, epoch, attempt)
            if budget is None or count_all(made, self.cutoff).sum() <= budget.n_edge:
                return made
        raise ValueError(f"{len(samples)} structures with noise of {self.noise} Å do not fit into {budget.n_edge} "
                         f"edges in {_TRIES} tries: lower the noise")

    def bounds(self, sizes: Sizes, frame_edges: np.ndarray | None = None) -> Sizes:
        """Sizes to plan batches by.

        Args:
          sizes: Of the samples at their reference geometries.
          frame_edges: Edges of the frames, in the order of frames.index.
        """
        edges = np.maximum(np.ceil(sizes.n_edge * _MORE), sizes.n_edge + _AT_LEAST) if self.noise else sizes.n_edge
        # no structure has more than all pairs
        edges = np.minimum(edges, np.maximum(sizes.n_node * (sizes.n_node - 1), sizes.n_edge)).astype(np.int64)
        if self.frames is not None and len(self.frames.index):
            sample = np.repeat(np.arange(len(edges)), np.diff(self.frames.first))
            np.maximum.at(edges, sample, frame_edges)
        return sizes._replace(n_edge=edges)

    def _drawn(self, columns, samples, epoch, attempt):
        positions, displacement = np.array(columns.positions), np.zeros_like(columns.positions)
        for s, sample in enumerate(samples.tolist()):
            rng = np.random.default_rng([self.seed, epoch + 1, sample, attempt])
            atoms = slice(columns.offsets[s], columns.offsets[s + 1])
            reference = columns.positions[atoms]
            chosen = self._frame(sample, columns.numbers[atoms], rng)
            positions[atoms] = reference + self.noise * rng.normal(size=reference.shape) if chosen is None else chosen
            displacement[atoms] = superpose(reference, positions[atoms]) - positions[atoms]
        return dataclasses.replace(columns, positions=positions,
                                   atom_properties={**columns.atom_properties, DISPLACEMENT: displacement})

    def _frame(self, sample, numbers, rng):
        """Positions of a random frame of the sample; None for noise."""
        frames = self.frames
        if frames is None or rng.random() >= self.share:
            return None
        own = frames.index[frames.first[sample]:frames.first[sample + 1]]
        if not len(own):
            return None
        frame = frames.rows.take(own[rng.integers(len(own))][None], labels_only=True)
        if not np.array_equal(frame.numbers, numbers):
            raise DatasetError(f"record {int(frame.record[0])}: its frames have other atoms, or another order of them, "
                               "than the geometry that the property belongs to")
        return frame.positions


@dataclasses.dataclass(frozen=True)
class NoisedRows:
    """Rows of samples displaced once and for all, to validate by. samples: Rows; made: What displaces them."""

    samples: Rows
    made: CoordinateNoise

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns:
        """As of any rows; the epoch is that before the first."""
        indices = np.asarray(indices)
        return self.made(self.samples.take(indices, labels_only=labels_only), indices, -1)
