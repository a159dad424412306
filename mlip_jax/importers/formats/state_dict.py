"""State dicts of PyTorch models as arrays, of which every one must be used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER


class StateDict:
    """Weights of a state dict that have not been converted yet.

    Each conversion removes its weights, so those without a counterpart remain.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self._left = dict(weights)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Remove a weight and return it in float32 or float64.

        Args:
          name: Name of the weight.
          *shape: Expected shape; None accepts any size, and no shape accepts every shape.

        Raises:
          WeightsError: There is no such weight, or it has another shape.
        """
        if name not in self._left:
            raise WeightsError(f"weight {name!r} is missing; there are {_shorten(self._left)}")
        array = np.asarray(self._left.pop(name))
        fits = array.ndim == len(shape) and all(s in (None, n) for s, n in zip(shape, array.shape))
        if shape and not fits:
            expected = ", ".join(str(s or "any") for s in shape)
            raise WeightsError(f"weight {name!r}: expected shape ({expected}), received {array.shape}")
        return array if array.dtype == np.float64 else array.astype(np.float32)

    def numbers(self, pattern: str) -> list[int]:
        """Return the sorted integers that the group of `pattern` matches at the start of names."""
        matches = (re.match(pattern, name) for name in self._left)
        return sorted({int(match[1]) for match in matches if match})

    def finish(self) -> None:
        """Raise WeightsError if weights remain."""
        if self._left:
            raise WeightsError(f"these weights have no counterpart here: {_shorten(self._left, 20)}")


def _shorten(names: Iterable[str], max_names: int = 8) -> str:
    """Format sorted names for a message."""
    names = sorted(names)
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


def numbers_of_symbols(symbols: Sequence[str]) -> tuple[int, ...]:
    """Return the atomic numbers of chemical symbols.

    Raises:
      WeightsError: A name is not a chemical symbol.
    """
    unknown = [s for s in symbols if not 1 <= atomic_numbers.get(s, 0) <= MAX_ATOMIC_NUMBER]
    if unknown:
        raise WeightsError(f"types must be named by chemical symbols, received {unknown}")
    return tuple(atomic_numbers[s] for s in symbols)
