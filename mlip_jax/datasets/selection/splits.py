"""Which structures are for training, which for validation, which for testing.

Every split is a function of its arguments and a seed alone: the same in every process and on every machine. But for
"random" it does not depend on the order of the structures either. Where structures are dealt out by molecule, scaffold
or size, whole ones are: the counts that were asked for are met as closely as these allow.

Scaffold splits after Bemis and Murcko, J. Med. Chem. 39, 2887 (1996), in the way of MoleculeNet (Wu et al., Chem. Sci.
9, 513 (2018)): the largest groups are for training, the rarest for testing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from mlip_jax.datasets.identity import group, index_type

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
    """Indices of the structures in "train", "valid" and "test": disjoint, sorted, int64.

    Methods:
      "random": structures are drawn one by one; conformations of one molecule come into all parts.
      "molecule": molecules are drawn; none stands in two parts.
      "scaffold": no scaffold stands in two parts. The scaffolds of most molecules are for training, the rarest for
        testing. Acyclic molecules share the scaffold "", as is the convention; where it is the most frequent one
        they are all for training.
      "scaffold_random": as before, with scaffolds drawn by `seed`; but one that has more structures than half of the
        smaller of valid and test is for training, so that "" or benzene does not make up a test set.
      "size": the smallest molecules are for training, the next for validation, the largest for testing; no number of
        atoms stands in two parts.
      "official": structures go where the data set's authors put their records; those in no part are left out. The
        parts are taken whole. Where there is no "valid", one is drawn from "train": whole molecules if train and
        test share none, else whole records.

    Args:
      by: One of the methods.
      counts: Structures asked for in train, valid and test. Where there are fewer in all, each part is scaled down in
        proportion; where there are more, the rest is left out, by scaffold and size as whole molecules from every
        part. Numbers that are all at most 1, with a sum of at most 1, are fractions of all structures. For
        "official" only the size of a drawn "valid" is taken from here, with train's structures as all structures.
      seed: Of whatever is drawn.
      molecule: Molecule of each structure, shape (S,), of any sortable type.
      scaffold: Scaffold of each structure, shape (S,): strings or any numbers that stand for them.
      n_atoms: Atoms of each structure, shape (S,).
      official: Record numbers by part: "train", perhaps "valid", "test".
      record: Record number of each structure, shape (S,), not negative.

    Raises:
      ValueError: Unknown method, an argument that it needs is missing or of another length, counts that mean nothing,
        fewer molecules (scaffolds, sizes) than parts, a molecule with two scaffolds or sizes, a record in two
        official parts, or an official part none of whose records is here.
    """
    if by not in METHODS:
        raise ValueError(f"data.split must be {', '.join(map(repr, METHODS))}; received {by!r}")
    molecule = np.asarray(molecule)
    columns = {"scaffold": scaffold, "n_atoms": n_atoms, "record": record}
    for name in {"scaffold": ["scaffold"], "scaffold_random": ["scaffold"], "size": ["n_atoms"],
                 "official": ["record"]}.get(by, []):
        if columns[name] is None or len(columns[name]) != len(molecule):
            found = "nothing" if columns[name] is None else f"{len(columns[name])} values"
            raise ValueError(f"a split by {by} needs `{name}` of {len(molecule)} structures; received {found}")
    if not len(molecule):
        raise ValueError("there are no structures to split")
    wanted = _wanted(counts, len(molecule))
    if by == "official":
        if official is None:
            raise ValueError("a split by official needs `official`: the data set has no split of its own; give it as "
                             "data.split_files, or choose another data.split")
        return _official(official, np.asarray(record), molecule, counts, seed)
    if by == "random":
        order = np.random.default_rng(seed).permutation(np.arange(len(molecule), dtype=index_type(len(molecule))))
        bounds = _bounds(np.ones(len(order), np.int8), wanted, by, len(molecule))
        return {name: np.sort(order[a:b]).astype(np.int64) for name, a, b in zip(SPLITS, bounds, bounds[1:])}
    unit_of, num_units = group(molecule)
    if by == "molecule":
        order = np.random.default_rng(seed).permutation(num_units)
        return _deal(unit_of, order, wanted, by)
    values = np.asarray(n_atoms if by == "size" else scaffold)
    group_of, num_groups = group(values)
    group_of_unit = _of_units(group_of, unit_of, num_units, values, molecule, METHODS[by])
    # Over all structures, and each part thinned afterwards: else the rarest scaffolds or the largest
    # molecules would be left out before any other.
    everything = wanted * (len(molecule) / wanted.sum())
    order = _order_groups(by, group_of, group_of_unit, num_groups, everything, seed)
    parts = _deal(group_of, order, everything, by)
    if wanted.sum() < len(molecule) - 0.5:
        rng = np.random.default_rng(seed)
        parts = {name: _thin(parts[name], unit_of, count, rng) for name, count in zip(SPLITS, wanted)}
    return parts


def describe(parts: Mapping[str, np.ndarray], molecule: np.ndarray) -> dict[str, dict[str, int]]:
    """Structures and molecules of every part: {"train": {"structures": 900, "molecules": 90}, ...}."""
    molecule = np.asarray(molecule)
    return {name: {"structures": len(indices), "molecules": group(molecule[indices])[1]}
            for name, indices in parts.items()}


def _wanted(counts: Sequence[float], total: int) -> np.ndarray:
    """Structures asked for in the three parts, float, together at most `total`."""
    wanted = np.asarray(counts, float)
    if wanted.shape != (3,) or not np.isfinite(wanted).all() or (wanted < 0).any() or wanted[0] == 0:
        raise ValueError("split counts must be three numbers, the first at least 1 (or fractions, the first above 0); "
                         f"received {list(counts)}")
    whole = (wanted == np.rint(wanted)).all()
    if (wanted <= 1).all() and (wanted.sum() <= 1 + 1e-9 or not whole):
        if wanted.sum() > 1 + 1e-9:
            raise ValueError(f"split counts {list(counts)} look like fractions, but their sum is {wanted.sum():g} and "
                             "not at most 1")
        return wanted * (total / max(wanted.sum(), 1.0))
    if wanted[0] < 1 or not whole:
        raise ValueError("split counts must be three whole numbers, the first at least 1, or three fractions; received "
                         f"{list(counts)}")
    return wanted * min(1.0, total / wanted.sum())


def _bounds(sizes: np.ndarray, wanted: np.ndarray, by: str, num_structures: int) -> list[int]:
    """Where the parts begin and end among units of `sizes` that stand in a row: [0, end of train, of valid, of test].

    A unit belongs to the part in whose share its middle lies; each part that is wanted has one unit at least.
    """
    if len(sizes) < (wanted > 0).sum():
        raise ValueError(f"{num_structures} structures of {len(sizes)} {METHODS[by]} cannot be split by {by} into "
                         f"{int((wanted > 0).sum())} parts")
    middle = np.cumsum(sizes, dtype=np.float64)
    middle -= 0.5 * sizes
    ends = np.searchsorted(middle, np.cumsum(wanted), side="left").tolist()
    for p in range(3):
        ends[p] = max(ends[p], (ends[p - 1] if p else 0) + int(wanted[p] > 0))
    last = len(sizes)
    for p in reversed(range(3)):
        ends[p] = min(ends[p], last)
        last = ends[p] - int(wanted[p] > 0)
    return [0, *ends]


def _deal(unit_of: np.ndarray, order: np.ndarray, wanted: np.ndarray, by: str) -> dict[str, np.ndarray]:
    """The structures of the first units in `order` to train, of the next to valid and test."""
    sizes = np.bincount(unit_of, minlength=len(order))[order]
    bounds = _bounds(sizes, wanted, by, len(unit_of))
    part_of_unit = np.full(len(order), len(SPLITS), np.int8)
    for p in range(len(SPLITS)):
        part_of_unit[order[bounds[p]:bounds[p + 1]]] = p
    part_of = part_of_unit[unit_of]
    return {name: np.flatnonzero(part_of == p) for p, name in enumerate(SPLITS)}


def _order_groups(by, group_of, group_of_unit, num_groups, wanted, seed) -> np.ndarray:
    """Groups in the order in which they are dealt out to train, valid and test."""
    if by == "size":
        return np.arange(num_groups)
    structures = np.bincount(group_of, minlength=num_groups)
    if by == "scaffold":
        molecules = np.bincount(group_of_unit, minlength=num_groups)
        return np.lexsort((np.arange(num_groups), -structures, -molecules))
    order = np.random.default_rng(seed).permutation(num_groups)
    held_out = wanted[1:][wanted[1:] > 0]
    large = structures[order] > (0.5 * held_out.min() if len(held_out) else 0)
    return np.concatenate([order[large], order[~large]])


def _of_units(group_of, unit_of, num_units, values, molecule, word) -> np.ndarray:
    """The group of each molecule, which must be one."""
    group_of_unit = np.zeros(num_units, group_of.dtype)
    group_of_unit[unit_of] = group_of
    other = np.flatnonzero(group_of_unit[unit_of] != group_of)
    if len(other):
        s = other[0]
        last = np.flatnonzero(unit_of == unit_of[s])[-1]
        raise ValueError(f"molecule {molecule[s]!s} has the {word} {values[s]!s} (structure {s}) and {values[last]!s} "
                         f"(structure {last}), and {len(np.unique(unit_of[other]))} molecules in all have several; "
                         "molecules would stand in two parts. Give all structures of a molecule the same.")
    return group_of_unit


def _thin(indices: np.ndarray, unit_of: np.ndarray, count: float, rng: np.random.Generator) -> np.ndarray:
    """Whole molecules of a part, drawn until about `count` structures are reached."""
    units, num_units = group(unit_of[indices])
    order = rng.permutation(num_units)
    if len(indices) <= count:
        return indices
    return indices[_deal(units, order, np.array([count, 0.0, 0.0]), "molecule")["train"]]


def _official(official, record, molecule, counts, seed) -> dict[str, np.ndarray]:
    parts = check_parts(official, "the official split")
    if "train" not in parts:
        raise ValueError(f"the official split has no part 'train', only {', '.join(map(repr, parts)) or 'nothing'}")
    part_of_record = np.full(max([int(record.max(initial=-1)) + 1] + [int(p.max(initial=-1)) + 1
                                                                     for p in parts.values()]), -1, np.int8)
    for p, name in enumerate(SPLITS):
        part_of_record[parts.get(name, [])] = p
    part_of = part_of_record[record]
    found = {name: np.flatnonzero(part_of == p) for p, name in enumerate(SPLITS)}
    for name, records in parts.items():
        if len(records) and not len(found[name]):
            raise ValueError(f"none of the {len(records)} records of the official part {name!r} is among the "
                             f"{len(record)} structures. Are they all left out, or is the split of another file?")
    if "valid" not in parts and float(counts[1]) > 0:
        found |= _draw_valid(found["train"], found["test"], record, molecule, counts, seed)
    return found


def _draw_valid(train, test, record, molecule, counts, seed) -> dict[str, np.ndarray]:
    """Train without the part that is drawn from it, and that part."""
    share = _wanted((counts[0], counts[1], 0), len(train))
    valid = max(round(share[1]), 1)
    of_molecules, num_molecules = group(molecule)
    apart = not np.isin(of_molecules[train], of_molecules[test]).any()
    by_molecule = apart and len(np.unique(of_molecules[train])) > 1
    units, num_units = group(molecule[train] if by_molecule else record[train])
    if num_units < 2:
        raise ValueError(f"the official split has no 'valid' and its 'train' of {len(train)} structures is one "
                         "record, from which none can be drawn. Ask for 0 validation structures.")
    order = np.random.default_rng(seed).permutation(num_units)
    drawn = _deal(units, order, np.array([len(train) - valid, valid, 0.0]), "molecule" if by_molecule else "official")
    result = {name: train[drawn[name]] for name in ("train", "valid")}
    log.warning("the official split has no validation part: %d structures (whole %s) are drawn from its training part "
                "with seed %d, which leaves %d", len(result["valid"]), "molecules" if by_molecule else "records", seed,
                len(result["train"]))
    return result


def check_parts(parts: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """The parts as int64 arrays.

    Raises:
      ValueError: A part that is not "train", "valid" or "test", or numbers that are no whole numbers, negative, twice
        in a part, or in two parts. `source` is named.
    """
    unknown = [name for name in parts if name not in SPLITS]
    if unknown:
        raise ValueError(f"{source} has the part {unknown[0]!r}; parts are {', '.join(map(repr, SPLITS))}")
    checked = {}
    for name, numbers in parts.items():
        numbers = np.asarray(numbers)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise ValueError(f"{source}: part {name!r} must be a list of whole numbers; received {numbers.dtype} of "
                             f"shape {numbers.shape}")
        numbers = numbers.astype(np.int64)
        if (numbers < 0).any():
            raise ValueError(f"{source}: part {name!r} has {(numbers < 0).sum()} negative numbers, the first "
                             f"{numbers[numbers < 0][0]}")
        different = np.unique(numbers)
        if len(different) < len(numbers):
            twice = np.sort(numbers)
            twice = twice[:-1][twice[1:] == twice[:-1]][0]
            raise ValueError(f"{source}: part {name!r} has {len(numbers) - len(different)} numbers more than once, the "
                             f"first {twice}")
        for other, before in checked.items():
            shared = np.intersect1d(before, different, assume_unique=True)
            if len(shared):
                raise ValueError(f"{source}: {len(shared)} numbers stand in both {other!r} and {name!r}, the first "
                                 f"{shared[0]}")
        checked[name] = numbers
    return checked
