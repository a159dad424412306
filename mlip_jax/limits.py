"""Limits on the data in files of other people, checked before memory or time is spent.

A small file can state any size: a line of gigabytes, an array without stored values, a million
layers. Each limit is far above all known data sets. Set its environment variable to raise it:

    MLIP_JAX_MAX_LINE_BYTES=100000000 mlip-jax convert --path trusted.xyz
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Limit(NamedTuple):
    """Largest value of a quantity of a file.

    Attributes:
      default: Limit without the environment variable.
      quantity: Description of the quantity and its unit, for messages.
    """

    default: int
    quantity: str


SMALL = 2**26  # decompressed bytes up to which any expansion is allowed
LIMITS = {
    "array_bytes": Limit(2**30, "bytes of one array"),
    "line_bytes": Limit(2**24, "bytes of one line"),
    "expansion": Limit(200, "bytes per compressed byte"),
    "structure_atoms": Limit(1_000_000, "atoms of one structure"),
    "image_atoms": Limit(10_000_000, "atoms in the periodic images within the cutoff"),
    "smiles_characters": Limit(10_000, "characters of one SMILES"),
    "option_value": Limit(100_000, "as the value, or number of values, of one model option"),
    "model_layers": Limit(100, "layers of one model"),
    "model_degree": Limit(12, "as a degree of spherical harmonics"),
}


def variable(name: str) -> str:
    """Return the environment variable of a limit.

    >>> variable("line_bytes")
    'MLIP_JAX_MAX_LINE_BYTES'
    """
    return f"MLIP_JAX_MAX_{name.upper()}"


def limit(name: str) -> int:
    """Return a limit.

    Raises:
      ValueError: Its environment variable is not a positive integer.
    """
    text = os.environ.get(variable(name))
    if text is None:
        return LIMITS[name].default
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{variable(name)}={text}: expected a positive integer")
    return int(text)


def check(
    name: str, value: int | float, source: object, error: type[ValueError | RuntimeError]
) -> None:
    """Raise an error if a quantity exceeds its limit.

    Args:
      name: Name of the limit.
      value: Quantity that the file states.
      source: File or record, for the message.
      error: Type of the error.
    """
    # not `value > limit`, which NaN would pass
    if not value <= limit(name):
        raise error(
            f"{source}: {value:,} {LIMITS[name].quantity}, more than the limit of "
            f"{limit(name):,}. The file is corrupted or malicious. If it is neither, set the "
            f"environment variable {variable(name)} to a larger number."
        )


def check_expansion(
    size: int, stored: int, source: object, error: type[ValueError | RuntimeError]
) -> None:
    """Raise an error if data are far larger than the compressed file that contains them.

    Args:
      size: Bytes of the data. Up to SMALL, any expansion is allowed.
      stored: Bytes of the file.
      source: File, for the message.
      error: Type of the error.
    """
    if size > SMALL:
        check("expansion", size // max(stored, 1), source, error)
