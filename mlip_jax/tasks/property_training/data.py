"""Data of a property predictor: samples with labels, their geometries, and the splits."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mlip_jax import distributed, models
from mlip_jax.config import ConfigError
from mlip_jax.datasets import property_data, source, unseen_elements
from mlip_jax.datasets.property_data import Samples, Target
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import data_split
from mlip_jax.datasets.selection import splits as splits_module
from mlip_jax.datasets.smiles.bond_graph import bond_graph
from mlip_jax.datasets.store.store import Store
from mlip_jax.datasets.unseen_elements import UnseenElements
from mlip_jax.graphs.bonds import bond_sizes, is_in_order
from mlip_jax.graphs.edge_counts import edge_counts
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import Sizes
from mlip_jax.importers import load_force_field
from mlip_jax.simulation.geometry_sources import LABELS, Geometries, Sources
from mlip_jax.simulation.trust import molecule_features
from mlip_jax.training.data import Split
from mlip_jax.training.dens import BatchNoise
from mlip_jax.training.noise import AlternativeGeometries, CoordinateNoise, NoisedRows
from mlip_jax.training.prepare import save_or_check_split, warn_of_unseen
from mlip_jax.training.recorder import writing
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_json

log = logging.getLogger(__name__)

SPLIT = "split_records.json"


@dataclasses.dataclass(frozen=True)
class PropertyData:
    """Samples of all splits: structures of the store that have the properties.

    Attributes:
      loaded: Data set.
      index: Indices of the structures in the store, (S,).
      values: Properties of these structures by name.
      splits: Indices of the samples of the splits "train", "valid" and "test", without samples
        with elements that the training split lacks.
      unseen: Numbers of such samples of the splits that have any.
      sources: Sources of the geometries of the samples.
      bonds: Whether the model reads the bonds of the SMILES in place of positions.
    """

    loaded: source.LoadedData
    index: np.ndarray
    values: dict[str, np.ndarray]
    splits: dict[str, np.ndarray]
    unseen: dict[str, UnseenElements]
    sources: Sources
    bonds: bool = False

    @classmethod
    def load(cls, config, workdir: Path) -> PropertyData:
        """Load and split the data set of `config`; the leader writes the split to `workdir`."""
        c = config.data
        loaded = source.load(c)
        index, values = loaded.indices, {}
        if config.property.targets:
            index, values = property_data.select_labeled(
                loaded.store, loaded.indices, config.property.targets
            )
        split_indices = data_split.split_data(
            dataclasses.replace(loaded, indices=index), c, molecule_features.of(c)
        )
        bonds = models.reads_bonds(models.find(config.model.name))
        if bonds:  # after the split, which is then that of other models
            model = models.create(config.model.name, **config.model.options)
            readable = index[
                _has_bond_graph(
                    loaded.store,
                    index,
                    models.max_heavy_atoms(model),
                    models.reads_positions(model),
                )
            ]
            split_indices = {k: np.intersect1d(v, readable) for k, v in split_indices.items()}
        if distributed.leader():
            with writing(workdir):
                _save_split(loaded.store, split_indices, c, workdir)
        splits = {name: np.searchsorted(index, indices) for name, indices in split_indices.items()}
        for name, samples in splits.items():
            log.info("%s: %s", name, count_of(len(samples), "structure"))
        unseen = _find_unseen(loaded.store, split_indices)
        splits |= {name: splits[name][numbers.known] for name, numbers in unseen.items()}
        sources = Sources(
            loaded.store,
            index,
            Path(c.directory) / "geometries",
            seed=config.seed,
            force_field=functools.partial(load_force_field, c.force_field)
            if c.force_field
            else None,
        )
        return cls(loaded, index, values, splits, unseen, sources, bonds)

    def split(
        self, name: str, geometry: str, targets: tuple[Target, ...], cutoff: float
    ) -> tuple[Split, Geometries]:
        """Return the samples of a split with the geometries of a source."""
        geometries = self.sources.get(geometry, self.splits[name])
        # Subtracting references requires only the elements, which all geometries share.
        labelled = self.loaded.store.take(self.index[geometries.samples], labels_only=True)
        properties = {
            t.name: t.to_training(self.values[t.name][geometries.samples], labelled)
            for t in targets
            if t.kind != "atom"
        }
        atom_targets = tuple(t for t in targets if t.kind == "atom")
        smiles = None
        if self.bonds:  # computed geometries have no SMILES of their own
            smiles = np.array(_smiles(self.loaded.store, self.index[geometries.samples]), object)
        rows = Samples(geometries.rows, geometries.index, properties, atom_targets, smiles)
        sizes = self._sizes(geometries, cutoff)
        return Split(rows, np.arange(len(rows)), sizes), geometries

    def _sizes(self, geometries: Geometries, cutoff: float) -> Sizes:
        """Return the sizes of the structures with these geometries."""
        store = self.loaded.store
        if self.bonds:
            return bond_sizes(_smiles(store, self.index[geometries.samples]))
        if geometries.rows is store:
            sizes = Sizes(store.index("n_atoms"), edge_counts(store, cutoff))
        else:
            sizes = graph_sizes(geometries.rows, cutoff)
        return sizes.take(geometries.index)


def _smiles(store: Store, index: np.ndarray) -> list[str]:
    """Return the SMILES of structures, "" if unknown."""
    codes, texts = store.texts("smiles")
    return [texts[code] for code in codes[index]]


def _has_bond_graph(
    store: Store, index: np.ndarray, limit: int | None, with_positions: bool
) -> np.ndarray:
    """Return whether the model can read the SMILES of each structure, (S,); log the others.

    `limit` is the largest number of heavy atoms; None for any number. If `with_positions`, the
    first atoms of a structure must be those of the SMILES, in its order.

    Raises:
      DatasetError: There is no such structure.
    """
    smiles = _smiles(store, index)
    log.info("reading the bonds of %s", count_of(len(set(smiles)), "molecule"))
    graphs = [bond_graph(text) for text in smiles]
    readable = np.array(
        [g is not None and (limit is None or len(g.atoms) <= limit) for g in graphs], bool
    )
    if with_positions:
        rows = np.flatnonzero(readable)
        columns = store.take(index[rows], labels_only=True)
        readable[rows] = [is_in_order(columns, s, graphs[row]) for s, row in enumerate(rows)]
    what = "without a SMILES that RDKit can read"
    what += "" if limit is None else f" with at most {limit} heavy atoms"
    what += " in the order of the SMILES, followed by the hydrogens" if with_positions else ""
    lost = np.flatnonzero(~readable)
    if len(lost) == len(readable):
        raise DatasetError(
            f"{store.path}: the model reads bonds, but all {len(readable)} structures are {what}. "
            "Use data with SMILES, or a model that only reads positions."
        )
    if len(lost):
        log.warning(
            "excluded: %s %s; the first is %r",
            count_of(len(lost), "structure"),
            what,
            store.take(index[lost[:1]]).source[0] + " " + smiles[lost[0]][:80],
        )
    return readable


def _find_unseen(
    store: Store, split_indices: Mapping[str, np.ndarray]
) -> dict[str, UnseenElements]:
    """Find and log the structures of "valid" and "test" with elements that "train" lacks."""
    elements: set[int] = set()
    for _, columns in store.chunks(split_indices["train"], labels_only=True):
        elements.update(np.unique(columns.numbers).tolist())
    found = {
        name: unseen_elements.of_rows(store, split_indices[name], elements)
        for name in sorted(set(split_indices) - {"train"})
    }
    found = {name: unseen for name, unseen in found.items() if len(unseen)}
    for name, unseen in found.items():
        warn_of_unseen(name, unseen)
    return found


def _save_split(store, split_indices: Mapping[str, np.ndarray], c, workdir: Path) -> None:
    """Write the split as splits.npz and as lists of records."""
    molecule, record = store.index("molecule"), store.index("record")
    save_or_check_split(
        workdir / "splits.npz",
        split_indices,
        {
            "store": str(store.path),
            "split": c.split_files or c.split,
            "seed": c.split_seed,
            "parts": splits_module.describe(split_indices, molecule),
        },
    )
    # Another run on the same file can use this as data.split_files: a force field must not be
    # trained on test molecules.
    write_json(
        workdir / SPLIT,
        {name: sorted(set(record[indices].tolist())) for name, indices in split_indices.items()},
    )


@dataclasses.dataclass(frozen=True)
class PropertyInputs:
    """Structures that a predictor is trained, validated and tested on.

    Attributes:
      train: Training split.
      valid: Validation split.
      tests: Test split and its geometries per geometry source.
      displace: Function that displaces training inputs, see `Batches`, or None.
      sizes: Sizes of the training structures before they are displaced.
    """

    train: Split
    valid: Split
    tests: dict[str, tuple[Split, Geometries]]
    displace: Callable | None
    sizes: Sizes

    @property
    def splits(self) -> dict[str, Split]:
        """All splits by name: "train", "valid" and "test GEOMETRY"."""
        tests = {f"test {name}": split for name, (split, _) in self.tests.items()}
        return {"train": self.train, "valid": self.valid, **tests}

    @classmethod
    def load(
        cls, config, data: PropertyData, targets: tuple[Target, ...], cutoff: float
    ) -> PropertyInputs:
        """Load the splits with the geometries that `config` names, and create the noise."""
        c = config.data
        train, geometries = data.split("train", c.geometry, targets, cutoff)
        sizes, noise = train.sizes, _create_noise(config, data, geometries, cutoff)
        valid, _ = data.split("valid", c.valid_geometry or c.geometry, targets, cutoff)
        displace: CoordinateNoise | BatchNoise | None = noise
        if noise is not None and not data.bonds:
            edges = edge_counts(data.loaded.store, cutoff)
            frame_edges = None if noise.frames is None else edges[noise.frames.index]
            train = dataclasses.replace(train, sizes=noise.bounds(train.sizes, frame_edges))
            if config.dens.weight:
                displace = BatchNoise(noise, config.dens.share)
            elif not targets:  # denoising is the only objective, also in validation
                valid_noise = dataclasses.replace(noise, frames=None, share=0.0)
                valid = dataclasses.replace(
                    valid,
                    rows=NoisedRows(valid.rows, valid_noise),
                    sizes=valid_noise.bounds(valid.sizes),
                )
        tests = {}
        if targets and len(data.splits["test"]):
            tests = {g: data.split("test", g, targets, cutoff) for g in c.test_geometries}
        return cls(train, valid, _restrict_to_common(tests), displace, sizes)


def _create_noise(
    config, data: PropertyData, geometries: Geometries, cutoff: float
) -> CoordinateNoise | None:
    """Return the noise of the training inputs, or None if the config sets none."""
    a = config.align
    if not a.noise and not a.frames:
        return None
    if config.data.geometry != LABELS:
        raise ConfigError(
            "align.noise and align.frames displace training inputs from the geometries of the "
            "labels. Set data.geometry='labels'."
        )
    frames = None
    if a.frames and data.bonds:
        others = data.sources.get(a.frames, geometries.samples)
        first = np.searchsorted(others.samples, np.append(geometries.samples, len(data.index)))
        frames = AlternativeGeometries(others.rows, others.index, first)
    elif a.frames:
        first, indices = data.sources.frames(a.frames, geometries.samples)
        log.info(
            "%d frames of %d of %d training molecules",
            len(indices),
            (np.diff(first) > 0).sum(),
            len(first) - 1,
        )
        frames = AlternativeGeometries(data.loaded.store, indices, first)
    share = a.frames_share if a.frames else 0.0
    return CoordinateNoise(a.noise, cutoff, config.seed, share, frames, heavy=data.bonds)


def _restrict_to_common(
    tests: dict[str, tuple[Split, Geometries]],
) -> dict[str, tuple[Split, Geometries]]:
    """Restrict the test splits to the molecules that have the geometries of all sources."""
    if not tests:
        return tests
    common = functools.reduce(np.intersect1d, [g.samples for _, g in tests.values()])
    largest = max(len(g.samples) for _, g in tests.values())
    if len(common) < largest:
        log.warning(
            "test: %d of %d molecules have all geometries; the others are excluded",
            len(common),
            largest,
        )
    restricted = {}
    for name, (split, geometries) in tests.items():
        members = np.flatnonzero(np.isin(geometries.samples, common))
        restricted[name] = (
            split.subset(members),
            dataclasses.replace(
                geometries, index=geometries.index[members], samples=geometries.samples[members]
            ),
        )
    return restricted
