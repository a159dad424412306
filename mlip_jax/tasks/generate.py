"""Task `generate`: generate the built-in data set, a SPICE-layout file with GFN2-xTB labels."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Generate the data set file of config.data and log a summary of its contents.

    Args:
      config: Config, see configs/generate.py.
      workdir: Folder for the file `embedded.h5`, used if config.data.path is empty.

    Returns:
      Path of the file.

    Raises:
      ImportError: RDKit or tblite is missing.
      ConfigError: A field of the config is unknown or invalid.
      ValueError: The file config.data.molecules contains no usable molecule.
      OSError: That file cannot be read, or the disk is full or not writable.
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
        kinds=data.kinds,
    )
    log.info("%s contains\n%s", path, json.dumps(summarize(path), indent=2))
    return path


def _read_molecules(path):
    """Return the molecules of a .smi file; unusable lines are logged and skipped."""
    from mlip_jax.datasets.builtin import read_smiles_file

    molecules, problems = read_smiles_file(path)
    for problem in problems:
        log.warning("skipped %s", problem)
    if not molecules:
        raise ValueError(
            f"data.molecules: {path} contains no usable molecule; expected one SMILES string per "
            "line"
        )
    return molecules
