"""State dict of TorchMD-Net's models by the names of version 3.1.0."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from mlip_jax.importers.formats.weights import WeightsError

# MODEL: prefix of the names of the representation.
MODEL = "representation_model."


class StateDict:
    """Arrays of a state dict by their names in TorchMD-Net 3.1.0; it records which have been used.

    It also accepts names of older versions and names with the prefix "model.", as saved by a
    training run.
    """

    def __init__(self, state: Mapping[str, np.ndarray]):
        def current_name(name):
            name = re.sub(r"^model\.", "", name)
            return re.sub(r"(output_network\.\d+\.update_net)\.(\d+)\.", r"\1.layers.\2.", name)

        self._arrays = {current_name(name): np.asarray(array) for name, array in state.items()}
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __call__(self, name: str) -> np.ndarray:
        """Return the array `name`.

        Raises:
          WeightsError: There is no such array.
        """
        if name not in self._arrays:
            raise WeightsError(
                f"the state dict does not contain {name!r}: it is incomplete, or not from an "
                "equivariant transformer with output model 'Scalar'. Present are "
                f"{', '.join(sorted(self._arrays)[:8])}, ..."
            )
        self._used.add(name)
        return self._arrays[name]

    def linear(
        self, name: str, inputs: int, outputs: int, bias: bool = True
    ) -> dict[str, np.ndarray]:
        """Return the kernel (inputs, outputs) and the bias of a linear layer.

        Raises:
          WeightsError: An array is missing, or the kernel has another shape.
        """
        if self(f"{name}.weight").shape != (outputs, inputs):
            raise WeightsError(
                f"{name}.weight must have shape ({outputs}, {inputs}) in this model, received "
                f"{self(f'{name}.weight').shape}"
            )
        kernel = {"kernel": self(f"{name}.weight").T}
        return kernel | ({"bias": self(f"{name}.bias")} if bias else {})

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """Return the scale and bias of a layer norm."""
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def names(self, pattern: str) -> list[str]:
        """Return the names that `pattern` matches from their start, sorted."""
        return sorted(name for name in self._arrays if re.match(pattern, name))

    def drop(self, *names: str) -> None:
        """Mark arrays that do not affect the energy as used."""
        self._used.update(names)

    def check_all_used(self) -> None:
        """Raise WeightsError if an array was not used.

        Otherwise the model would silently differ from the trained one.
        """
        unused = sorted(set(self._arrays) - self._used)
        if unused:
            raise WeightsError(
                f"{len(unused)} arrays of the state dict are not part of an equivariant "
                f"transformer with these hyperparameters: {', '.join(unused[:8])}"
            )
