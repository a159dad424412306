"""Molecules of the input file of a config, for all tasks with the fields of `MOLECULES`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_collections

from mlip_jax.datasets.molecules.files import count_molecules, read_molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.datasets.smiles.entries import CsvColumns


def read_input(
    config: ml_collections.ConfigDict, *, seed: int | None = None, **options: Any
) -> Iterator[MoleculeRecord]:
    """Read the molecules of config.input; see `read_molecules`.

    Args:
      config: Config with the fields of `defaults.shared_parts.MOLECULES`.
      seed: Seed of the embedding; None is config.seed.
      **options: Other arguments of `read_molecules`.
    """
    return read_molecules(
        config.input,
        columns=_columns(config),
        limit=config.limit,
        mmff=config.mmff,
        seed=config.seed if seed is None else seed,
        **options,
    )


def count_input(config: ml_collections.ConfigDict) -> int:
    """Return the number of molecules that `read_input` reads.

    Raises:
      DatasetError: The file contains no molecules, or cannot be read.
    """
    count = count_molecules(config.input, _columns(config))
    if not count:
        raise DatasetError(f"{config.input}: contains no molecules")
    return count if config.limit is None else min(count, config.limit)


def _columns(config):
    return CsvColumns(config.smiles_column, config.name_column)
