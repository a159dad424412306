"""Export of a force field as a function in a file that runs with JAX but without this package.

`export_stablehlo` writes force_field.stablehlo, which contains the parameters, and
force_field.json, which describes the inputs: sizes, units, cutoff, reference energies. A Python
program evaluates the function as follows, for atomic numbers `numbers` (n,) and positions
`positions` (n, 3) in Å; it needs NumPy, JAX and flatbuffers, which jax.export
uses to read its files:

    import json
    import jax, jax.export
    import numpy as np

    about = json.load(open("force_field.json"))
    program = open("force_field.stablehlo", "rb").read()
    run = jax.jit(jax.export.deserialize(bytearray(program)).call)

    n, rows, real = len(numbers), about["rows"], about["dtype"]
    i, j = np.triu_indices(n, 1)  # each pair once, those within the cutoff
    close = np.linalg.norm(positions[i] - positions[j], axis=1) < about["cutoff"]
    pairs = np.full((about["max_pairs"], 2), rows - 1, np.int32)  # padding: last row to itself
    pairs[:close.sum()] = np.stack([i, j], axis=1)[close]
    out = run({"positions": np.pad(positions, ((0, rows - n), (0, 0))).astype(real),
               "numbers": np.pad(numbers, (0, rows - n)).astype(np.int32),
               "num_atoms": np.int32(n), "pairs": pairs,
               "charge": np.zeros((), real), "num_unpaired_electrons": np.zeros((), real)})
    reference = np.array(about["reference_energies"])[numbers]
    energies = np.asarray(out["energies"], np.float64)[:n] + reference
    energy, forces = energies.sum(), np.asarray(out["forces"])[:n]  # eV, eV/Å

`rows` is the maximum number of atoms plus one: the last row is always padding. A file in float64
requires `jax.config.update("jax_enable_x64", True)` first. In single precision keep positions near
the origin.

Periodic files take "cell" (3, 3) and "shifts" (max_pairs, 3), where the vector of a pair is
`positions[j] - positions[i] + shift @ cell`, and return "stress". An atom and its own image are a
pair, too; include either shift or -shift. Force fields with long-range terms take
"long_range_pairs", which are all pairs within `long_range_cutoff` (null: all pairs), padded in the
same way.

In periodic files, force fields with Ewald sums require periodicity in all three directions. The
program has room for "max_vectors" reciprocal vectors of each of its "lattice_sums". In a cell that
needs more, all results are NaN. With its "k_max" and the lengths of the lattice vectors, a cell
needs

    (np.prod(2 * np.floor(k_max * lengths / (2 * np.pi)) + 1) - 1) / 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax import __version__
from mlip_jax.files import atomic_open
from mlip_jax.graphs.long_range import LatticeSumCutoff, of_boundaries
from mlip_jax.potential import Potential, evaluate
from mlip_jax.target_device import portable_programs
from mlip_jax.workdir import write_json

PROGRAM, DESCRIPTION = "force_field.stablehlo", "force_field.json"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_VERSION = 1
# _DENSITY: atoms/Å³ that the default number of pairs allows for: water has 0.10, diamond 0.18
_DENSITY = 0.15


def export_stablehlo(
    potential: Potential,
    folder: str | Path,
    *,
    max_atoms: int,
    max_pairs: int | None = None,
    max_long_range_pairs: int | None = None,
    periodic: bool = False,
    dtype: str = "float32",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> Path:
    """Write energies and forces for up to `max_atoms` atoms as StableHLO with a description.

    JAX guarantees to read such a file for at least half a year of its releases, and to write files
    that three weeks old releases can read.

    Args:
      potential: Force field. Its parameters are cast to `dtype` and stored in the file.
      folder: Folder for the files, created if missing. Existing files of these names are replaced.
      max_atoms: Maximum number of atoms of a structure.
      max_pairs: Maximum number of pairs within the cutoff, each counted once; None: all pairs, or
        those of a dense solid if that is less.
      max_long_range_pairs: The same for the long-range cutoff, if the force field has one.
      periodic: Whether the function takes a cell and shifts and returns the stress.
      dtype: "float32" or "float64".
      platforms: Subset of PLATFORMS; none of them needs to be available.

    Returns:
      The folder.

    Raises:
      ValueError: If a size is below 1, dtype or a platform is unknown, or `periodic` is combined
        with an infinite long-range cutoff.
      OSError, WorkdirError: If the folder cannot be written.
    """
    reach = of_boundaries(potential.long_range_cutoff, periodic)
    limits = {
        "max_atoms": max_atoms,
        "max_pairs": max_pairs,
        "max_long_range_pairs": max_long_range_pairs,
    }
    _check_arguments(limits, periodic, dtype, platforms, reach)
    sizes = {
        "rows": max_atoms + 1,
        "max_pairs": max_pairs or default_pairs(max_atoms, potential.cutoff, periodic),
    }
    if reach is not None:
        sizes["max_long_range_pairs"] = max_long_range_pairs or default_pairs(
            max_atoms, reach, periodic
        )
    inputs = _inputs(sizes, periodic, dtype)
    with jax.enable_x64(dtype == "float64"), portable_programs():
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), potential.params)
        exported = jax.export.export(
            jax.jit(_function(potential, params, periodic)), platforms=list(platforms)
        )({name: jax.ShapeDtypeStruct(tuple(i["shape"]), i["dtype"]) for name, i in inputs.items()})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_open(folder / PROGRAM) as file:
        file.write(exported.serialize())
    outputs = {
        name: {"shape": list(o.shape), "dtype": str(o.dtype), "unit": _UNITS[name]}
        for name, o in jax.tree.unflatten(exported.out_tree, exported.out_avals).items()
    }
    write_json(
        folder / DESCRIPTION,
        {
            "format": "mlip_jax StableHLO",
            "version": _VERSION,
            "written_by": f"mlip_jax {__version__}, jax {jax.__version__}",
            "force_field": potential.digest(),
            "conservative": potential.conservative,
            "platforms": list(platforms),
            "dtype": dtype,
            "periodic": periodic,
            **sizes,
            "max_atoms": max_atoms,
            "cutoff": potential.cutoff,
            "long_range_cutoff": None if reach is None or math.isinf(reach) else reach,
            "lattice_sums": describe_lattice_sums(potential.long_range_cutoff, periodic),
            "elements": [int(z) for z in potential.elements],
            "inputs": inputs,
            "outputs": outputs,
            "reference_energies": potential.reference_energies.tolist(),
            "reference_energies_of": "per atomic number, eV; add that of each atom in double "
            "precision",
        },
    )
    return folder


def describe_lattice_sums(cutoff: float | None, periodic: bool) -> list[dict[str, float]]:
    """Return the limits of the Ewald sums of a program, [] if it has none.

    Args:
      cutoff: Long-range cutoff of the force field.
      periodic: Whether the program takes a cell.
    """
    sums = cutoff.sums if periodic and isinstance(cutoff, LatticeSumCutoff) else ()
    return [{"k_max": lattice.k_max, "max_vectors": lattice.room} for lattice in sums]


def default_pairs(max_atoms: int, cutoff: float, periodic: bool) -> int:
    """Return a capacity for pairs within a cutoff, each counted once.

    Args:
      max_atoms: Maximum number of atoms.
      cutoff: Cutoff radius (Å); inf for all pairs.
      periodic: Whether structures are periodic.
    """
    every = max_atoms * (max_atoms - 1) // 2
    if math.isinf(cutoff):
        return max(every, 1)
    dense = math.ceil(0.5 * max_atoms * _DENSITY * 4 / 3 * math.pi * cutoff**3)
    return max(dense if periodic else min(every, dense), 1)


def _check_arguments(limits, periodic, dtype, platforms, reach) -> None:
    """Raise ValueError if an argument of `export_stablehlo` is invalid."""
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, received {value}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f'dtype must be "float32" or "float64", received {dtype!r}')
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(
            f"platforms must be among {', '.join(PLATFORMS)}, received {list(platforms)}"
        )
    if periodic and reach is not None and math.isinf(reach):
        raise ValueError(
            "a periodic structure has infinitely many pairs. Set a finite cutoff for the "
            "long-range terms of the force field, or export it for open boundaries."
        )


_UNITS = {
    "energy": "eV, without reference energies",
    "energies": "eV, without reference energies",
    "forces": "eV/Angstrom",
    "stress": "eV/Angstrom^3, positive under tension",
}


def _inputs(sizes: dict[str, int], periodic: bool, dtype: str) -> dict[str, dict[str, Any]]:
    """Return shape, dtype, unit and padding of the inputs of the function, by name."""

    def one(shape, kind, unit, padding=None):
        return {
            "shape": list(shape),
            "dtype": kind,
            "unit": unit,
            **({"padding": padding} if padding else {}),
        }

    rows, last = sizes["rows"], "the last row, as sender and receiver"
    inputs = {
        "positions": one((rows, 3), dtype, "Angstrom", "0"),
        "numbers": one((rows,), "int32", "atomic number", "0"),
        "num_atoms": one((), "int32", "number of atoms without padding"),
        "charge": one((), dtype, "e"),
        "num_unpaired_electrons": one((), dtype, "1"),
    }
    for kind in ("", "long_range_"):
        if f"max_{kind}pairs" in sizes:
            size = sizes[f"max_{kind}pairs"]
            inputs[f"{kind}pairs"] = one((size, 2), "int32", "atoms i and j, each pair once", last)
            if periodic:
                inputs[f"{kind}shifts"] = one(
                    (size, 3), "int32", "lattice vectors added to atom j", "0"
                )
    return inputs | ({"cell": one((3, 3), dtype, "Angstrom, vectors as rows")} if periodic else {})


def _function(potential: Potential, params, periodic: bool):
    """Return the function that is exported."""

    def energies_and_forces(inputs):
        out = evaluate(
            potential.model, params, _graph(inputs), potential.energy_scale, with_stress=periodic
        )
        outputs = {"energy": out.energy[0], "energies": out.energies, "forces": out.forces}
        return outputs | ({"stress": out.stress[0]} if periodic else {})

    return energies_and_forces


def _graph(inputs: dict[str, jax.Array]) -> jraph.GraphsTuple:
    """Build the graph of the structure and a padding graph, in the layout of graphs/graph.py.

    It contains both directions of each pair, sorted by receiver.
    """
    rows, dtype = inputs["positions"].shape[0], inputs["positions"].dtype
    first, second = inputs["pairs"].T
    receivers, senders = jnp.concatenate([first, second]), jnp.concatenate([second, first])
    order = jnp.argsort(receivers, stable=True)
    # position of each direction of a pair after sorting
    edges = {"pair_order": jnp.argsort(order).astype(jnp.int32)}
    n_node = jnp.stack([inputs["num_atoms"], rows - inputs["num_atoms"]])
    real = jnp.sum(receivers < inputs["num_atoms"], dtype=jnp.int32)
    if "shifts" in inputs:
        edges["shifts"] = jnp.concatenate([inputs["shifts"], -inputs["shifts"]])[order]
    if "long_range_pairs" in inputs:
        i, j = inputs["long_range_pairs"].T
        edges["long_range"] = {"receivers": i, "senders": j}
        if "long_range_shifts" in inputs:
            edges["long_range"]["shifts"] = inputs["long_range_shifts"]
    of_structure = {"charge": inputs["charge"], "spin": inputs["num_unpaired_electrons"]}
    if "cell" in inputs:
        of_structure["cell"] = inputs["cell"]
    return jraph.GraphsTuple(
        nodes={"positions": inputs["positions"], "numbers": inputs["numbers"]},
        edges=edges,
        receivers=receivers[order],
        senders=senders[order],
        n_node=n_node,
        n_edge=jnp.stack([real, receivers.shape[0] - real]),
        globals={
            name: jnp.stack([value, jnp.zeros_like(value)]).astype(dtype)
            for name, value in of_structure.items()
        },
    )
