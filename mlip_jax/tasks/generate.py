"""Task `generate`: makes the embedded data set, a SPICE-layout file with GFN2-xTB labels."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Makes the file of config.data and logs what is in it.

    Args:
      config: see configs/generate.py.
      workdir: where the file goes when config.data.path is empty, as `embedded.h5`.

    Returns:
      Path of the file.

    Raises:
      ImportError: if RDKit or tblite is missing.
      ConfigError: if a field of the config is unknown or invalid.
      ValueError: if config.data.molecules names a file without a single usable molecule.
      OSError: if that file cannot be read, or the disk is full or cannot be written to.
    """
    from mlip_jax.datasets.builtin import generate_embedded, summarize

    data = configs.complete(config, defaults.generate_defaults()).data
    path = Path(data.path) if data.path else Path(workdir) / "embedded.h5"
    path = generate_embedded(
        path,
        num_conformations=data.num_conformations,
        seed=data.seed,
        num_processes=data.num_processes or None,
        molecules=_read_molecules(data.molecules) if data.molecules else None,
    )
    log.info("%s holds\n%s", path, json.dumps(summarize(path), indent=2))
    return path


def _read_molecules(path):
    """The molecules of a .smi file; lines that cannot be used are logged and left out."""
    from mlip_jax.datasets.builtin import read_smiles_file

    molecules, problems = read_smiles_file(path)
    for problem in problems:
        log.warning("skipped %s", problem)
    if not molecules:
        raise ValueError(f"config.data.molecules: {path} has no usable molecule; expected a SMILES string per line")
    return molecules
