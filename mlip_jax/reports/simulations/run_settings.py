"""The settings of a simulation for its report: input, force field, config and hardware."""

import platform
from typing import Any

import jax

from mlip_jax import config as configs
from mlip_jax import distributed
from mlip_jax.datasets.molecules.files import fingerprint
from mlip_jax.potential import Potential
from mlip_jax.simulation.ensemble_mean import level_of_theory


def run_settings(
    config, potential: Potential, subject: str = "Molecules", units: str = ""
) -> dict[str, dict[str, Any]]:
    """Return names and values of input, force field, settings and hardware for the report.

    Args:
      config: Config of the task, with `input` and `force_field`.
      potential: The force field.
      subject: Heading of the input.
      units: Units of the settings for their heading, such as "fs, K, Å".
    """
    settings = configs.to_dict(config)
    for name in ("task", "force_field", "input"):
        settings.pop(name)
    return {
        subject: {"input": config.input, **fingerprint(config.input)},
        "Force field": {
            "from": config.force_field,
            "digest": potential.digest(),
            "forces": potential.origin_of_forces,
            "level of theory": level_of_theory(potential),
            "cutoff (Å)": potential.cutoff,
        },
        f"Settings ({units})" if units else "Settings": {
            name: "" if value is None else str(value) for name, value in settings.items()
        },
        "Hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """Return names and values of the devices, processes and system."""
    return {
        "devices": f"{jax.local_device_count()} × {jax.devices()[0].device_kind}",
        "processes": distributed.count(),
        "machine": platform.machine(),
        "system": platform.platform(),
    }
