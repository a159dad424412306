"""RDKit's parsers in the process of native parsers: binary molecules, SMILES and mol blocks."""

from __future__ import annotations

import functools
import logging
import struct
import threading
from collections.abc import Sequence

import numpy as np

from mlip_jax import limits, workers
from mlip_jax.datasets.isolation import program
from mlip_jax.datasets.isolation.process import PARSERS, SECONDS, ParserDeathError, ParserProcess

log = logging.getLogger(__name__)
_of_thread = threading.local()


def read_binaries(
    binaries: Sequence[bytes],
) -> list[tuple[np.ndarray, np.ndarray, float] | ValueError]:
    """Return atomic numbers (n,), positions (Å) (n, 3) and formal charge (e) of each molecule.

    A molecule that RDKit cannot read, or that crashes it, results in an error.

    Raises:
      ImportError: RDKit is missing.
    """
    try:
        reply = PARSERS.call("read_rdkit_binaries", *binaries)
    except ParserDeathError as error:
        if len(binaries) == 1:
            return [error]
        return [result for binary in binaries for result in read_binaries([binary])]
    return [_result(*reply[k : k + 3]) for k in range(0, len(reply), 3)]


def _result(
    head: bytes, numbers: bytes, positions: bytes
) -> tuple[np.ndarray, np.ndarray, float] | ValueError:
    """Return the molecule, or the error, of one part of a reply."""
    if len(head) > 8:
        return ValueError(head[8:].decode("utf-8", "replace"))
    return (
        np.frombuffer(numbers, np.int32).copy(),
        np.frombuffer(positions, np.float64).reshape(-1, 3).copy(),
        float(struct.unpack("=q", head)[0]),
    )


def identify_smiles(smiles: str) -> str | None:
    """Return the canonical SMILES without stereochemistry, isotopes and explicit hydrogens.

    Returns None if RDKit cannot read the SMILES. If it crashes or hangs, this is logged. A worker
    process, which may die, calls RDKit itself, because conversions identify many molecules.

    Raises:
      ImportError: RDKit is missing.
    """
    encoded = smiles.encode("utf-8", "surrogatepass")
    try:
        if workers.is_isolated():
            with workers.time_limit(SECONDS):
                reply = program.identify_smiles(encoded)
        else:
            reply = PARSERS.call("identify_smiles", encoded)
    except ParserDeathError as error:
        _warn(smiles, error)
        return None
    except (ValueError, RuntimeError):  # RDKit raises both
        return None
    return reply[0].decode() if reply else None


def embed(
    binary: bytes, count: int, seed: int, *, mmff: bool, timeout: int, seconds: float
) -> tuple[list[np.ndarray], bool]:
    """Embed conformers of a molecule, in a process that may die.

    Args:
      binary: Molecule with all hydrogens in RDKit's binary form.
      count: Number of conformers.
      seed: Seed.
      mmff: Whether to relax the conformers with MMFF94 if it has parameters for the molecule.
      timeout: Time limit of each of two attempts (s).
      seconds: Time limit of all (s).

    Returns:
      The positions (Å) of each conformer, (n, 3), and whether they were relaxed.

    Raises:
      ParserDeathError (a ValueError): RDKit crashed, hung, or needed too much memory.
      ValueError, RuntimeError: RDKit raised an error.
    """
    numbers = (str(int(number)).encode() for number in (count, seed, timeout, mmff))
    if workers.is_isolated():
        relaxed, *positions = program.embed(binary, *numbers)
    else:
        relaxed, *positions = _embedder().call("embed", binary, *numbers, seconds=seconds)
    return [np.frombuffer(p).reshape(-1, 3).copy() for p in positions], bool(relaxed)


def _embedder() -> ParserProcess:
    """Return the process that embeds molecules for this thread, so that threads do not wait."""
    if threading.current_thread() is threading.main_thread():
        return PARSERS
    if not hasattr(_of_thread, "process"):
        _of_thread.process = ParserProcess()
    return _of_thread.process


def is_safe_smiles(smiles: str) -> bool:
    """Return whether RDKit survives a SMILES. Invalid SMILES are safe. Log one that is not safe."""
    return len(smiles) <= limits.limit("smiles_characters") and is_safe("check_smiles", smiles)


def is_safe_mol_block(block: str) -> bool:
    """Return whether RDKit survives a mol block; see `is_safe_smiles`."""
    return is_safe("check_mol_block", block)


@functools.lru_cache(maxsize=1 << 12)
def is_safe(parser: str, text: str) -> bool:
    """Return whether RDKit survives a text."""
    try:
        PARSERS.call(parser, text.encode("utf-8", "surrogatepass"))
    except ParserDeathError as error:
        _warn(text, error)
        return False
    except (ValueError, ImportError):
        pass
    return True


def _warn(text: str, error: ParserDeathError) -> None:
    """Log a text that RDKit does not survive."""
    log.warning("RDKit cannot read %r (%s); it is skipped", text[:200], error)
