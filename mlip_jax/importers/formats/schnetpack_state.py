"""State dict of a SchNetPack 2 model, from which weights are taken one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from mlip_jax.importers.formats.weights import WeightsError

EMBEDDING = "representation.embedding.weight"


class RemainingWeights:
    """Weights that have not been converted yet.

    Each conversion removes its weights, so those without a counterpart remain.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        embeddings = [name for name in weights if name.endswith(EMBEDDING)]
        if len(embeddings) != 1:
            raise WeightsError(
                f"expected the state dict of one SchNetPack model, with one {EMBEDDING!r}; "
                f"received {len(embeddings)} of them in {len(weights)} arrays: "
                f"{list_names(weights)}"
            )
        prefix = embeddings[0].removesuffix(EMBEDDING)
        self.left = {
            name.removeprefix(prefix) if name.startswith(prefix) else name: array
            for name, array in weights.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Remove a weight and return it in float32 or float64.

        Args:
          name: Name of the weight.
          *shape: Expected shape; None accepts any size, and no shape accepts every shape.
        """
        if name not in self.left:
            raise WeightsError(f"weight {name!r} is missing; present are {list_names(self.left)}")
        array = np.asarray(self.left.pop(name))
        if shape and (
            array.ndim != len(shape) or any(s not in (None, n) for s, n in zip(shape, array.shape))
        ):
            raise WeightsError(
                f"weight {name!r}: expected shape ({', '.join(str(s or 'any') for s in shape)}), "
                f"received {array.shape}"
            )
        return array if array.dtype == np.float64 else array.astype(np.float32)

    def dense(
        self, name: str, num_in: int, num_out: int | None, use_bias: bool = True
    ) -> dict[str, np.ndarray]:
        """Remove a linear layer and return its kernel and bias."""
        kernel = self.take(f"{name}.weight", num_out, num_in).T
        return {"kernel": kernel} | (
            {"bias": self.take(f"{name}.bias", kernel.shape[1])} if use_bias else {}
        )

    def number(self, name: str) -> float:
        """Remove a weight of any shape that contains a single number and return it."""
        array = self.take(name)
        if array.size != 1:
            raise WeightsError(
                f"weight {name!r}: expected one number, received shape {array.shape}"
            )
        return float(array.reshape(()))

    def numbers(self, pattern: str) -> list[int]:
        """Return the sorted integers that the group of `pattern` matches at the start of names."""
        matches = (re.match(pattern, name) for name in self.left)
        return sorted({int(match[1]) for match in matches if match})

    def count(self, name: str) -> int:
        """Return the number of blocks `name.0`, `name.1`, ..."""
        numbers = self.numbers(rf"{re.escape(name)}\.(\d+)\.")
        if numbers != list(range(len(numbers))) or not numbers:
            raise WeightsError(
                f"expected the blocks {name}.0, {name}.1, ... without gaps, received "
                f"{numbers}; blocks that share their weights must be stored under each name"
            )
        return len(numbers)

    def finish(self) -> None:
        """Raise WeightsError if weights remain."""
        if self.left:
            raise WeightsError(
                f"unsupported weights: {list_names(self.left, 20)}. Only PaiNN and SchNet with one "
                "Atomwise output (two layers, the energy) can be imported. Exclude the "
                "weights of other outputs when saving, if the energy does not depend on them."
            )


def list_names(names: Iterable[str], max_names: int = 8) -> str:
    """Format sorted names for a message, at most `max_names` of them."""
    names = sorted(names)
    more = len(names) - max_names
    return ", ".join(names[:max_names]) + (f" and {more} more" if more > 0 else "")
