"""State dicts of PyTorch models, converted piece by piece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.importers.formats.weights import WeightsError


class TorchWeights:
    """Weights of a state dict, which records those that have been converted.

    Weights that no conversion has used have no counterpart in the model (`check_all_taken`).
    """

    def __init__(self, weights: Mapping[str, np.ndarray], marker: str, architecture: str):
        """Remove the prefix of the names, such as "module." of a distributed training.

        Args:
          weights: State dict as arrays.
          marker: End of the name of a weight that every model has exactly once.
          architecture: Name of the architecture, for messages.

        Raises:
          WeightsError: There is no such weight, or several.
        """
        names = [name for name in weights if name.endswith(marker)]
        if len(names) != 1:
            raise WeightsError(
                f"expected the state dict of {architecture}, with one weight {marker!r}; received "
                f"{len(names)} of them among {len(weights)} arrays, so it is not that of "
                f"{architecture}: {_listed(weights)}"
            )
        prefix = names[0].removesuffix(marker)
        self._architecture, self._taken = architecture, set()
        self._arrays = {
            name.removeprefix(prefix): np.asarray(array) for name, array in weights.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def array(self, name: str) -> np.ndarray:
        """Return a weight as it is stored.

        Raises:
          WeightsError: The weight is missing.
        """
        if name not in self._arrays:
            raise WeightsError(
                f"weight {name!r} is missing from the state dict; it is not that of "
                f"{self._architecture}, or incomplete; there are {_listed(self._arrays)}"
            )
        self._taken.add(name)
        return self._arrays[name]

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Return a weight in float32 or float64.

        Args:
          name: Name of the weight.
          *shape: Expected shape; None accepts any size, and no shape accepts every shape.

        Raises:
          WeightsError: The weight is missing or has another shape.
        """
        array = self.array(name)
        expected = array.ndim == len(shape) and all(
            s in (None, n) for s, n in zip(shape, array.shape)
        )
        if shape and not expected:
            raise WeightsError(
                f"weight {name!r}: expected shape ({', '.join(str(s or 'any') for s in shape)}), "
                f"received {array.shape}"
            )
        if array.dtype.kind in "iu":
            return array
        return array if array.dtype == np.float64 else array.astype(np.float32)

    def dense(self, name: str, use_bias: bool = True) -> dict[str, np.ndarray]:
        """Return kernel and bias of a linear layer."""
        kernel = self.take(f"{name}.weight", None, None).T
        bias = {"bias": self.take(f"{name}.bias", kernel.shape[1])} if use_bias else {}
        return {"kernel": kernel} | bias

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """Return scale and bias of a layer norm."""
        return {"scale": self.take(f"{name}.weight"), "bias": self.take(f"{name}.bias")}

    def count(self, name: str) -> int:
        """Return the number of blocks `name.0`, `name.1`, ..."""
        found = (re.match(rf"{re.escape(name)}\.(\d+)\.", key) for key in self._arrays)
        numbers = sorted({int(match[1]) for match in found if match})
        if not numbers or numbers != list(range(len(numbers))):
            raise WeightsError(f"expected blocks {name}.0, {name}.1, ..., received {numbers}")
        return len(numbers)

    def drop(self, pattern: str) -> None:
        """Mark weights without effect, whose whole names match the regular expression `pattern`."""
        self._taken |= {name for name in self._arrays if re.fullmatch(pattern, name)}

    def check_all_taken(self) -> None:
        """Raise WeightsError if weights remain: the model would differ from the trained one."""
        left = set(self._arrays) - self._taken
        if left:
            raise WeightsError(
                f"{len(left)} weights have no counterpart in {self._architecture} with these "
                f"settings: {_listed(left, 20)}"
            )


def element_numbers(
    elements: Sequence[int | str] | None, rows: Sequence[int], path
) -> tuple[int, ...]:
    """Return the atomic numbers of `elements`; None stands for all elements with weights.

    Args:
      elements: Symbols or atomic numbers.
      rows: Atomic numbers with weights.
      path: File of the weights, for the message.

    Raises:
      ValueError: There are no weights for an element.
    """
    if elements is None:
        return tuple(rows)
    known = tuple(
        sorted({atomic_numbers.get(z, -1) if isinstance(z, str) else int(z) for z in elements})
    )
    if not known or not set(known) <= set(rows):
        raise ValueError(
            f"{path}: elements must be symbols or atomic numbers from {min(rows)} to {max(rows)}, "
            f"which have weights; received {list(elements)}"
        )
    return known


def _listed(names, most: int = 8) -> str:
    """Format sorted names for a message, at most `most` of them."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
