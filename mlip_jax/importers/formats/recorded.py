"""Weights of state dicts in the flat layout of e3nn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.importers.formats.torch_weights import TorchWeights
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.models.layers.tensor_products.irreps import Irrep, Irreps, to_text


class RecordedWeights(TorchWeights):
    """Weights of a state dict, some of them in the flat layout of e3nn.

    Args:
      state: Arrays by name.
      program: Name of the model, for messages.
      anchor: End of the name of an array that every state dict has once. What precedes it, such as
        "model.", is removed from all names.
    """

    def __init__(self, state: Mapping[str, np.ndarray], program: str, anchor: str):
        super().__init__(state, anchor, program)

    def __call__(self, name: str, size: int | None = None) -> np.ndarray:
        """Return the array `name` as it is stored.

        Raises:
          WeightsError: There is no such array, or it does not have `size` numbers.
        """
        array = self.array(name)
        if size is not None and array.size != size:
            raise WeightsError(
                f"{name} must have {size} numbers in this model, received {array.size}; do the weights "
                "and the settings belong together?"
            )
        return array

    def series(self, pattern: str) -> list[np.ndarray]:
        """Return the arrays whose names match `pattern`, ordered by the number in its group."""
        found = [(int(m[1]), name) for name in self._arrays if (m := re.fullmatch(pattern, name))]
        return [self(name) for _, name in sorted(found)]

    def linear(self, name: str, inputs: Irreps, outputs: Irreps) -> dict[str, np.ndarray]:
        """Return the kernels of e3nn's Linear by irrep, shape (inputs, outputs) each.

        Irreps appear at most once in `inputs` and in `outputs`.
        """
        shapes = self._pairs(inputs, outputs, lambda u, w: (u, w))
        return self._split(name, shapes, inputs, outputs)

    def products(
        self, name: str, inputs: Irreps, attributes: int, outputs: Irreps
    ) -> dict[str, np.ndarray]:
        """Return the kernels of e3nn's FullyConnectedTensorProduct with scalars by irrep.

        The shape of each is (attributes, inputs, outputs).
        """
        shapes = self._pairs(inputs, outputs, lambda u, w: (u, attributes, w))
        kernels = self._split(name, shapes, inputs, outputs)
        return {irrep: kernel.transpose(1, 0, 2) for irrep, kernel in kernels.items()}

    @staticmethod
    def _pairs(inputs, outputs, shape):
        width = {irrep: channels for channels, irrep in outputs}
        return [
            (irrep, shape(channels, width[irrep])) for channels, irrep in inputs if irrep in width
        ]

    def _split(self, name, shapes: Sequence[tuple[Irrep, tuple[int, ...]]], inputs, outputs):
        flat, start, kernels = self(name).reshape(-1), 0, {}
        if flat.size != (expected := sum(int(np.prod(shape)) for _, shape in shapes)):
            raise WeightsError(
                f"{name} must have {expected} numbers for {to_text(inputs)} -> {to_text(outputs)}, "
                f"received {flat.size}; do the weights and the settings belong together?"
            )
        for irrep, shape in shapes:
            size = int(np.prod(shape))
            kernels[str(irrep)] = flat[start : start + size].reshape(shape)
            start += size
        return kernels


def table_of(elements: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Return a table by atomic number, shape (119,), zero for other elements; one value is repeated."""
    table = np.zeros(119, np.float64)
    table[list(elements)] = np.broadcast_to(
        np.asarray(values, np.float64).reshape(-1), len(elements)
    )
    return table


def numbers_of(symbols: Sequence[str]) -> tuple[int, ...]:
    """Return the atomic numbers of chemical symbols.

    Raises:
      ValueError: A symbol is unknown.
    """
    unknown = [s for s in symbols if s not in atomic_numbers]
    if unknown:
        raise ValueError(f"expected chemical symbols, received {', '.join(map(repr, unknown))}")
    return tuple(atomic_numbers[s] for s in symbols)
