"""Sweeps: run the variants of a config one after another and collect their results in a table.

Next to get_config(), a config file defines a function sweep() that returns a list of variants. A
variant is a dictionary of config fields whose values replace those of get_config() and of the
command line.

    from mlip_jax.sweeps import product

    def sweep():
        return product({"model.name": ["so3krates", "painn"], "seed": [0, 1, 2]})

A variant may have a "name" for its folder; the default is built from its values. With "config" it
is a variant of another config file, "FILE" or "FILE:ARGUMENT". "{sweep}/NAME" in a value is
replaced by the folder of the variant NAME, which runs first. If the config file defines
report(folder), the sweep calls this function at its end.

Modules:
  variants: Loads and checks the variants of a config file.
  names: Chooses the names of variants.
  overrides: Changes config fields.
  runner: Runs variants as child processes (`child_process`) and writes their table.
  attempts: Reads and writes the state of a variant in its folder.
"""

from mlip_jax.sweeps.variants import product

__all__ = ["product"]
