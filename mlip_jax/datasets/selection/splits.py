"""Splits of the structures into training, validation and test.

A split depends only on its arguments and a seed, so it is the same in every process and on every
machine. Except for "random", it does not depend on the order of the structures either. Splits by
molecule, scaffold or size keep molecules, scaffolds or sizes together, and therefore match the
requested counts only approximately.

Scaffold splits follow Bemis and Murcko, J. Med. Chem. 39, 2887 (1996), and MoleculeNet (Wu et al.,
Chem. Sci. 9, 513 (2018)): the largest groups are for training and the rarest ones for testing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from mlip_jax.datasets.identity import group, index_type
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
METHODS = {
    "molecule": "molecules",
    "random": "structures",
    "scaffold": "scaffolds",
    "scaffold_random": "scaffolds",
    "size": "sizes",
    "official": "records",
}


def split(
    by: str,
    counts: Sequence[float],
    *,
    seed: int,
    molecule: np.ndarray,
    scaffold: np.ndarray | None = None,
    n_atoms: np.ndarray | None = None,
    official: Mapping[str, np.ndarray] | None = None,
    record: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Split structures into "train", "valid" and "test".

    Methods:
      "random": Structures are drawn individually, so conformations of one molecule can be in all
        splits.
      "molecule": Molecules are drawn. No molecule appears in two splits.
      "scaffold": No scaffold appears in two splits. The scaffolds with the most molecules are for
        training, the rarest for testing. By convention, acyclic molecules share the scaffold "". If
        it is the most frequent scaffold, all of them are for training.
      "scaffold_random": Scaffolds are drawn with `seed`. Scaffolds with more structures than half
        of the smaller of valid and test are for training, so that "" or benzene cannot dominate a
        test set.
      "size": The smallest molecules are for training, the next for validation and the largest for
        testing. No number of atoms appears in two splits.
      "official": The split of the authors of the data set. Splits are used completely, and records
        in no split are excluded. If "valid" is missing, it is drawn from "train": whole molecules
        if train and test share none, or else whole records.

    Args:
      by: One of the methods.
      counts: Requested numbers of structures in train, valid and test. If the data have fewer
        structures, all counts are scaled down in proportion. If they have more, the rest is
        excluded; splits by scaffold and size then lose whole molecules from each split. If all
        counts and their sum are at most 1, they are fractions of all structures. The method
        "official" uses the counts only for the size of a drawn "valid", relative to "train".
      seed: Seed of all random draws.
      molecule: Molecule of each structure, (S,), of any sortable type.
      scaffold: Scaffold of each structure, (S,), as strings or integer codes.
      n_atoms: Number of atoms per structure, (S,).
      official: Record numbers of the splits "train" and, optionally, "valid" and "test".
      record: Record number of each structure, (S,), not negative.

    Returns:
      Indices of the structures in each split: disjoint, sorted, int64.

    Raises:
      ValueError: The method is unknown, a required argument is missing or has the wrong length, the
        counts are invalid, there are fewer molecules (scaffolds, sizes) than splits, a molecule has
        two scaffolds or sizes, a record is in two official splits, or an official split has no
        record in the data.
    """
    if by not in METHODS:
        raise ValueError(f"data.split must be {', '.join(map(repr, METHODS))}; received {by!r}")
    molecule = np.asarray(molecule)
    columns = {"scaffold": scaffold, "n_atoms": n_atoms, "record": record}
    for name in {
        "scaffold": ["scaffold"],
        "scaffold_random": ["scaffold"],
        "size": ["n_atoms"],
        "official": ["record"],
    }.get(by, []):
        if columns[name] is None or len(columns[name]) != len(molecule):
            received = "nothing" if columns[name] is None else f"{len(columns[name])} values"
            raise ValueError(
                f"a split by {by} requires `{name}` of {len(molecule)} structures; received "
                f"{received}"
            )
    if not len(molecule):
        raise ValueError("no structures to split")
    requested = _requested_counts(counts, len(molecule))
    if by == "official":
        if official is None:
            raise ValueError(
                "a split by official requires `official`: the data set has no official split. Set "
                "data.split_files, or choose another data.split."
            )
        return _official(official, np.asarray(record), molecule, counts, seed)
    if by == "random":
        order = np.random.default_rng(seed).permutation(
            np.arange(len(molecule), dtype=index_type(len(molecule)))
        )
        bounds = _bounds(np.ones(len(order), np.int8), requested, by, len(molecule))
        return {
            name: np.sort(order[a:b]).astype(np.int64)
            for name, a, b in zip(SPLITS, bounds, bounds[1:])
        }
    unit_of, num_units = group(molecule)  # units are molecules, (S,)
    if by == "molecule":
        order = np.random.default_rng(seed).permutation(num_units)
        return _deal(unit_of, order, requested, by)
    values = np.asarray(n_atoms if by == "size" else scaffold)
    group_of, num_groups = group(values)  # groups are scaffolds or sizes, (S,)
    group_of_unit = _groups_of_units(group_of, unit_of, num_units, values, molecule, METHODS[by])
    # Split all structures first and thin each split afterwards. Otherwise, the rarest scaffolds or
    # the largest molecules would be excluded first.
    everything = requested * (len(molecule) / requested.sum())
    order = _order_groups(by, group_of, group_of_unit, num_groups, everything, seed)
    parts = _deal(group_of, order, everything, by)
    if requested.sum() < len(molecule) - 0.5:
        rng = np.random.default_rng(seed)
        parts = {
            name: _thin(parts[name], unit_of, count, rng) for name, count in zip(SPLITS, requested)
        }
    return parts


def describe(parts: Mapping[str, np.ndarray], molecule: np.ndarray) -> dict[str, dict[str, int]]:
    """Count structures and molecules: {"train": {"structures": 900, "molecules": 90}, ...}."""
    molecule = np.asarray(molecule)
    return {
        name: {"structures": len(indices), "molecules": group(molecule[indices])[1]}
        for name, indices in parts.items()
    }


def _requested_counts(counts: Sequence[float], total: int) -> np.ndarray:
    """Return the requested numbers of structures per split, (3,) float, at most `total` in sum."""
    requested = np.asarray(counts, float)
    if (
        requested.shape != (3,)
        or not np.isfinite(requested).all()
        or (requested < 0).any()
        or requested[0] == 0
    ):
        raise ValueError(
            "split counts must be three numbers, the first at least 1 (or fractions, the first "
            f"above 0); received {list(counts)}"
        )
    whole = (requested == np.rint(requested)).all()
    if (requested <= 1).all() and (requested.sum() <= 1 + 1e-9 or not whole):
        if requested.sum() > 1 + 1e-9:
            raise ValueError(
                f"split counts {list(counts)} look like fractions, but their sum is "
                f"{requested.sum():g}, above 1"
            )
        return requested * (total / max(requested.sum(), 1.0))
    if requested[0] < 1 or not whole:
        raise ValueError(
            "split counts must be three integers, the first at least 1, or three fractions; "
            f"received {list(counts)}"
        )
    return requested * min(1.0, total / requested.sum())


def _bounds(sizes: np.ndarray, requested: np.ndarray, by: str, num_structures: int) -> list[int]:
    """Divide a sequence of units into splits: [0, end of train, end of valid, end of test].

    A unit belongs to the split whose range of structures contains the middle of the unit. Each
    requested split gets at least one unit.

    Args:
      sizes: Number of structures per unit, in order.
      requested: Requested numbers of structures per split, (3,).
      by: Method, for messages.
      num_structures: Total number of structures, for messages.
    """
    if len(sizes) < (requested > 0).sum():
        remedy = (
            "Add structures, or do without a split: --config.data.num_valid=0 or "
            "--config.data.num_test=0"
            if by == "random"
            else "Set --config.data.split=random to split by structure, or do without a split: "
            "--config.data.num_valid=0 or --config.data.num_test=0"
        )
        raise ValueError(
            f"{count_of(num_structures, 'structure')} of "
            f"{count_of(len(sizes), METHODS[by].removesuffix('s'))} cannot be split by {by} "
            f"into {int((requested > 0).sum())} splits. {remedy}."
        )
    # Middle of each unit on the axis of all structures, (units,).
    middle = np.cumsum(sizes, dtype=np.float64)
    middle -= 0.5 * sizes
    ends = np.searchsorted(middle, np.cumsum(requested), side="left").tolist()
    # Give each requested split at least one unit: first toward the end, then back from the end.
    for p in range(3):
        ends[p] = max(ends[p], (ends[p - 1] if p else 0) + int(requested[p] > 0))
    last = len(sizes)
    for p in reversed(range(3)):
        ends[p] = min(ends[p], last)
        last = ends[p] - int(requested[p] > 0)
    return [0, *ends]


def _deal(
    unit_of: np.ndarray, order: np.ndarray, requested: np.ndarray, by: str
) -> dict[str, np.ndarray]:
    """Assign the first units in `order` to train, the next to valid and test; return structures."""
    sizes = np.bincount(unit_of, minlength=len(order))[order]  # structures per unit, in order
    bounds = _bounds(sizes, requested, by, len(unit_of))
    part_of_unit = np.full(len(order), len(SPLITS), np.int8)
    for p in range(len(SPLITS)):
        part_of_unit[order[bounds[p] : bounds[p + 1]]] = p
    part_of = part_of_unit[unit_of]  # number of the split per structure, (S,)
    return {name: np.flatnonzero(part_of == p) for p, name in enumerate(SPLITS)}


def _order_groups(by, group_of, group_of_unit, num_groups, requested, seed) -> np.ndarray:
    """Return the groups in the order of their assignment to train, valid and test."""
    if by == "size":
        return np.arange(num_groups)
    structures = np.bincount(group_of, minlength=num_groups)
    if by == "scaffold":
        molecules = np.bincount(group_of_unit, minlength=num_groups)
        return np.lexsort((np.arange(num_groups), -structures, -molecules))
    order = np.random.default_rng(seed).permutation(num_groups)
    held_out = requested[1:][requested[1:] > 0]
    large = structures[order] > (0.5 * held_out.min() if len(held_out) else 0)
    return np.concatenate([order[large], order[~large]])


def _groups_of_units(group_of, unit_of, num_units, values, molecule, word) -> np.ndarray:
    """Return the group of each molecule, (num_units,). Raise ValueError if one has several."""
    group_of_unit = np.zeros(num_units, group_of.dtype)
    group_of_unit[unit_of] = group_of
    other = np.flatnonzero(group_of_unit[unit_of] != group_of)
    if len(other):
        s = other[0]
        last = np.flatnonzero(unit_of == unit_of[s])[-1]
        raise ValueError(
            f"molecule {molecule[s]!s} has the {word} {values[s]!s} (structure {s}) and "
            f"{values[last]!s} (structure {last}), and {len(np.unique(unit_of[other]))} molecules "
            f"have several; such molecules would be in two splits. Assign the same "
            f"{word} to all structures of a molecule."
        )
    return group_of_unit


def _thin(
    indices: np.ndarray, unit_of: np.ndarray, count: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw whole molecules of a split until about `count` structures are reached."""
    units, num_units = group(unit_of[indices])
    order = rng.permutation(num_units)
    if len(indices) <= count:
        return indices
    return indices[_deal(units, order, np.array([count, 0.0, 0.0]), "molecule")["train"]]


def _official(official, record, molecule, counts, seed) -> dict[str, np.ndarray]:
    """Return the structures of each official split, with "valid" drawn from "train" if missing."""
    parts = check_parts(official, "the official split")
    if "train" not in parts:
        raise ValueError(
            f"the official split lacks 'train'; found {', '.join(map(repr, parts)) or 'nothing'}. "
            "Choose another --config.data.split"
        )
    part_of_record = np.full(
        max(
            [int(record.max(initial=-1)) + 1] + [int(p.max(initial=-1)) + 1 for p in parts.values()]
        ),
        -1,
        np.int8,
    )
    for p, name in enumerate(SPLITS):
        part_of_record[parts.get(name, [])] = p
    part_of = part_of_record[record]
    structures = {name: np.flatnonzero(part_of == p) for p, name in enumerate(SPLITS)}
    for name, records in parts.items():
        if len(records) and not len(structures[name]):
            raise ValueError(
                f"none of the {len(records)} records of the official split {name!r} is among the "
                f"{len(record)} structures. Check the filters, and whether the split belongs to "
                "this file."
            )
    if "valid" not in parts and float(counts[1]) > 0:
        structures |= _draw_valid(
            structures["train"], structures["test"], record, molecule, counts, seed
        )
    return structures


def _draw_valid(train, test, record, molecule, counts, seed) -> dict[str, np.ndarray]:
    """Draw a validation split from `train` and return both splits."""
    sizes = _requested_counts((counts[0], counts[1], 0), len(train))
    # At least one structure remains for training.
    valid = min(max(round(sizes[1]), 1), len(train) - 1)
    of_molecules, num_molecules = group(molecule)
    disjoint = not np.isin(of_molecules[train], of_molecules[test]).any()
    by_molecule = disjoint and len(np.unique(of_molecules[train])) > 1
    units, num_units = group(molecule[train] if by_molecule else record[train])
    if num_units < 2:
        raise ValueError(
            f"the official split has no 'valid' and its 'train' of {len(train)} structures is one "
            "record, which cannot be divided. Set data.num_valid=0."
        )
    order = np.random.default_rng(seed).permutation(num_units)
    drawn = _deal(
        units,
        order,
        np.array([len(train) - valid, valid, 0.0]),
        "molecule" if by_molecule else "official",
    )
    result = {name: train[drawn[name]] for name in ("train", "valid")}
    log.warning(
        "the official split has no validation split: drawing %d structures (whole %s) from its "
        "training split with seed %d, which leaves %d",
        len(result["valid"]),
        "molecules" if by_molecule else "records",
        seed,
        len(result["train"]),
    )
    return result


def check_parts(parts: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Validate the splits and return them as int64 arrays.

    Args:
      parts: Numbers by split.
      source: Name of the source, for messages.

    Raises:
      ValueError: A split is not "train", "valid" or "test", or a number is not an integer, is
        negative, or appears twice in a split or in two splits.
    """
    unknown = [name for name in parts if name not in SPLITS]
    if unknown:
        raise ValueError(
            f"{source} has the unknown split {unknown[0]!r}; expected "
            f"{', '.join(map(repr, SPLITS))}"
        )
    checked = {}
    for name, numbers in parts.items():
        numbers = np.asarray(numbers)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise ValueError(
                f"{source}: split {name!r} must be a list of integers; received {numbers.dtype} of "
                f"shape {numbers.shape}"
            )
        numbers = numbers.astype(np.int64)
        if (numbers < 0).any():
            raise ValueError(
                f"{source}: split {name!r} has {(numbers < 0).sum()} negative numbers, the first "
                f"{numbers[numbers < 0][0]}"
            )
        distinct = np.unique(numbers)
        if len(distinct) < len(numbers):
            twice = np.sort(numbers)
            twice = twice[:-1][twice[1:] == twice[:-1]][0]
            raise ValueError(
                f"{source}: split {name!r} has {len(numbers) - len(distinct)} repeated numbers, "
                f"the first {twice}"
            )
        for other, before in checked.items():
            shared = np.intersect1d(before, distinct, assume_unique=True)
            if len(shared):
                raise ValueError(
                    f"{source}: {len(shared)} numbers are in both {other!r} and {name!r}, the "
                    f"first {shared[0]}"
                )
        checked[name] = numbers
    return checked
