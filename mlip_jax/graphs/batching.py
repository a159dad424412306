"""Padded batches of static shape, planned from known sizes.

A plan is a pure function of the order of the structures, their sizes and the budget: the same on every run and every
host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.capacities import Capacities, candidates
from mlip_jax.graphs.edge_counts import count_all, count_all_pairs
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list

# Structures that compete for the gap which the in-order ones leave in a batch.
_WINDOW = 256
# Pairs go with the square of the size, so that batches of as many edges differ in them.
_PAIR_SLACK = 1.25
# A batch less full than this is tried in larger buckets, up to so many times: others hold many more structures.
_FULL, _NEAR = 0.95, 1.5
# What budgets are chosen by, and on which a few plans are tried: at least so many structures, and so many batches.
_SAMPLE, _TRIAL, _TRIAL_BATCHES = 20_000, 768, 48
# A further budget is compiled once more, and has to reach what is wanted or to come so much closer to it.
_WORTH = 0.01
# Of the waste that is allowed, what a sample may show: other orders are somewhat worse.
_MARGIN = 0.85
_NEAR_BATCH_SIZE = np.log(1.1)


class Sizes(NamedTuple):
    """Atoms and directed edges of each structure and, where wanted, its long-range pairs: shape (S,), int64."""

    n_node: np.ndarray
    n_edge: np.ndarray
    n_pair: np.ndarray | None = None

    def take(self, places: np.ndarray) -> Sizes:
        """The sizes of the structures at `places`."""
        return Sizes(*(None if size is None else np.asarray(size[places], np.int64) for size in self))


class Budget(NamedTuple):
    """Static shape of a batch, its padding graph and padding atom included; no long-range pairs unless wanted."""

    nodes: int
    edges: int
    graphs: int
    pairs: int = 0


def measure(columns: Columns, cutoff: float, long_range_cutoff: float | None = None) -> Sizes:
    """Atoms, edges and, with a long-range cutoff, pairs of every structure."""
    n_pair = None if long_range_cutoff is None else count_all_pairs(columns, long_range_cutoff)
    return Sizes(columns.n_atoms.astype(np.int64), count_all(columns, cutoff).astype(np.int64), n_pair)


def choose_budget(sizes: Sizes, batch_size: float) -> Budget:
    """A budget that holds every structure, and about `batch_size` average ones with little padding.

    Edges are what costs, so that they are made to be the limit that fills up: atoms, graphs and pairs get some slack.
    """
    _check_some(sizes)
    edges = max(int(np.ceil(batch_size * sizes.n_edge.mean())), int(sizes.n_edge.max()), 2)
    return _budget(sizes, _round_up(edges, 16), batch_size)


def choose_budgets(sizes: Sizes, batch_size: float, *, most: int = 4, waste: float = 0.05) -> tuple[Budget, ...]:
    """Ascending budgets of which the last holds every structure, for `plan_buckets`.

    One, if with it a batch holds `batch_size` structures on average, within a tenth, and no more than the share
    `waste` of the edges is padding; else as few as reach that, or up to `most` of those that come closest. Found by
    planning a sample, so that it is a function of the arguments alone.

    Args:
      batch_size: Structures of a batch on average; below 1 it counts as 1.
      most: Of budgets. waste: Share of padding edges.

    Raises:
      ValueError: No structures, no budgets, or a batch size that is not positive.
    """
    _check_some(sizes)
    if not batch_size > 0 or most < 1:
        raise ValueError(f"budgets need a positive batch size and at least one budget, received {batch_size=} and "
                         f"{most=}")
    if not sizes.n_edge.any():
        return (choose_budget(sizes, batch_size),)
    batch_size = max(batch_size, 1)
    rng = np.random.default_rng(0)
    sample = sizes
    if len(sizes.n_edge) > _SAMPLE:
        drawn = rng.choice(len(sizes.n_edge), _SAMPLE, replace=False)
        drawn[0] = np.argmax(sizes.n_edge)
        sample = sizes.take(drawn)
    trial = max(_TRIAL, int(_TRIAL_BATCHES * batch_size))
    # Few structures are planned several times over: how full the last batch of an epoch is, is not to be judged.
    order = np.concatenate([rng.permutation(len(sample.n_edge)) for _ in range(8)])[:trial]
    best, best_score = None, np.inf
    for num in range(1, most + 1):
        for found in candidates(sample.n_edge, batch_size, num):
            for capacities, score in _tried(found, sample, order, batch_size, waste):
                more = best is not None and len(capacities.edges) > len(best.edges)
                if score < best_score - (_WORTH if more and score > 0 else 0):
                    best, best_score = capacities, score
            if best_score <= 0:
                return _budgets(sizes, best)
    return _budgets(sizes, best)


def _tried(capacities: Capacities, sizes: Sizes, order: np.ndarray, batch_size: float, waste: float,
           ) -> Iterator[tuple[Capacities, float]]:
    """Capacities, also cut to what of them was used, and how far from what is wanted they are (0: not at all)."""
    for _ in range(2):
        budgets = _budgets(sizes, capacities)
        plan = plan_buckets(order, sizes, budgets)
        plan = plan[:-1] or plan
        used = np.zeros(len(budgets), np.int64)
        for bucket, places in plan:
            used[bucket] = max(used[bucket], sizes.n_edge[places].sum())
        count = sum(len(places) for _, places in plan) / len(plan)
        excess = 1 - fill_buckets(plan, sizes, budgets)["edges"] - _MARGIN * waste
        yield capacities, max(excess, 0) + max(abs(np.log(count / batch_size)) - _NEAR_BATCH_SIZE, 0)
        cut = np.maximum(used, _largest_within(sizes, capacities))
        if (cut >= 0.995 * np.array([b.edges for b in budgets])).all():
            return
        # a bucket that nothing came into is the one before it
        capacities = capacities._replace(edges=tuple(np.unique(np.maximum.accumulate(cut)).tolist()))


def _largest_within(sizes: Sizes, capacities: Capacities) -> np.ndarray:
    """Edges of the largest structure that fits into each bucket."""
    return np.array([sizes.n_edge[sizes.n_edge <= edges].max(initial=2) for edges in capacities.edges])


def _budgets(sizes: Sizes, capacities: Capacities) -> tuple[Budget, ...]:
    made = []
    for edges in capacities.edges:
        edges = _round_up(max(edges, 2), 16 if edges >= 512 else 2)
        within = sizes.take(np.flatnonzero(sizes.n_edge <= max(edges, sizes.n_edge.min())))
        mean = within.n_edge.mean()
        made.append(_budget(within, edges, max(edges / mean, 1) if mean else 1))
        if capacities.alone:
            made[-1] = made[-1]._replace(nodes=_round_up(int(within.n_node.max()) + 1, 8), graphs=2)
    return tuple(Budget(*map(int, b)) for b in np.maximum.accumulate(made))


def _budget(sizes: Sizes, edges: int, count: float) -> Budget:
    """Of so many edges, for about `count` structures of these sizes and for each of them alone."""
    few = 1 + 1.5 / np.sqrt(count)
    nodes = max(int(np.ceil(count * sizes.n_node.mean() * min(few, 1.1))), int(sizes.n_node.max())) + 1
    graphs = max(int(np.ceil(count * min(few, 1.5))), 1) + 1
    pairs = 0
    if sizes.n_pair is not None:
        pairs = max(int(np.ceil(count * sizes.n_pair.mean() * min(few, _PAIR_SLACK))), int(sizes.n_pair.max()), 1)
    return Budget(_round_up(nodes, 8), edges, graphs, _round_up(pairs, 16))


def _check_some(sizes: Sizes) -> None:
    if not len(sizes.n_node):
        raise ValueError("a batch budget needs at least one structure")


def enlarge(budget: Budget, sizes: Sizes) -> Budget:
    """The budget, larger where a structure does not fit into an empty batch."""
    if not len(sizes.n_node):
        return budget
    return budget._replace(nodes=max(budget.nodes, int(sizes.n_node.max()) + 1),
                           edges=max(budget.edges, int(sizes.n_edge.max())),
                           pairs=budget.pairs if sizes.n_pair is None else max(budget.pairs, int(sizes.n_pair.max())))


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def check_sizes(sizes: Sizes, budget: Budget, name: Callable[[int], str] = "structure {}".format) -> None:
    """Raises ValueError where a structure does not fit into an empty batch; `name` tells what it is called."""
    n_pair = _pairs_of(sizes)
    too_large = (sizes.n_node > budget.nodes - 1) | (sizes.n_edge > budget.edges) | (n_pair > budget.pairs)
    if too_large.any():
        s = int(np.flatnonzero(too_large)[0])
        has, room = (f", {n_pair[s]} long-range pairs", f", {budget.pairs} pairs") if n_pair.any() else ("", "")
        raise ValueError(
            f"{name(s)} has {sizes.n_node[s]} atoms and {sizes.n_edge[s]} edges{has} and does not fit into a batch of "
            f"{budget.nodes - 1} atoms and {budget.edges} edges{room}; {too_large.sum()} such structures. "
            "Give a larger batch size or leave them out with data.max_atoms.")


def _pairs_of(sizes: Sizes) -> np.ndarray:
    return np.zeros(len(sizes.n_node), np.int64) if sizes.n_pair is None else sizes.n_pair


def plan_window(order: np.ndarray, sizes: Sizes, budget: Budget) -> list[np.ndarray]:
    """Batches that together hold every structure of `order` once: in that order, but that gaps are filled.

    Args:
      order: Numbers of structures, (W,).
      sizes: Of all structures.
      budget: Of one batch.

    Raises:
      ValueError: A structure does not fit into an empty batch.
    """
    return [places for _, places in plan_buckets(order, sizes, (budget,))]


def plan_buckets(order: np.ndarray, sizes: Sizes, budgets: Sequence[Budget]) -> list[tuple[int, np.ndarray]]:
    """`plan_window` with batches of several shapes: (bucket, numbers of structures) of each.

    A batch begins with the first structure that is left, in the smallest bucket that holds this one or, where that
    would not get full, a little larger one: batches of all buckets come mixed as the structures do. What else there
    is room for may be large or small.

    Args:
      budgets: Ascending: all that fits into one fits into the next.

    Raises:
      ValueError: A structure does not fit into an empty batch of the last budget; budgets that do not ascend.
    """
    if not budgets or any(a > b for low, high in zip(budgets, budgets[1:]) for a, b in zip(low, high)):
        raise ValueError(f"expected one or more budgets, each at least as large as the one before, received {budgets}")
    ordered = sizes.take(order)
    check_sizes(ordered, budgets[-1], lambda s: f"structure {order[s]}")
    needs = np.stack([ordered.n_node, ordered.n_edge, _pairs_of(ordered)])
    rooms = [np.array([b.nodes - 1, b.edges, b.pairs]) for b in budgets]
    near = [[k for k in range(first, len(budgets)) if k == first or budgets[k].edges <= _NEAR * budgets[first].edges]
            for first in range(len(budgets))]
    smallest = np.argmax([(needs <= room[:, None]).all(axis=0) for room in rooms], axis=0)
    batches, pool, position = [], np.zeros(0, np.int64), 0
    while position < len(order) or len(pool):
        fresh = np.arange(position, min(position + _WINDOW - len(pool), len(order)))
        position += len(fresh)
        pool = np.concatenate([pool, fresh])
        best = -1.0
        for k in near[smallest[pool[0]]]:
            fitting = np.flatnonzero(smallest[pool] <= k)
            found = fitting[_fill(needs[:, pool[fitting]], rooms[k], budgets[k].graphs - 1)]
            share = needs[1, pool[found]].sum() / max(budgets[k].edges, 1)
            if share > best:
                best, bucket, chosen = share, k, found
            if share >= _FULL:
                break
        batches.append((bucket, order[pool[chosen]]))
        pool = np.delete(pool, chosen)
    return batches


def _fill(sizes: np.ndarray, room: np.ndarray, room_graph: int) -> np.ndarray:
    """Positions in the pool that make one batch: in order while they fit, then the largest that fit the gap.

    The last one in order is chosen for the gap too: with few structures in a batch this is what makes it small.

    Args:
      sizes: Atoms, edges and pairs of the pool, (3, W). room: For them, (3,). room_graph: For structures.
    """
    run = (np.cumsum(sizes, axis=1) <= room[:, None]).all(axis=0)
    count = len(run) if run.all() else max(int(np.argmin(run)) - 1, 1)
    count = min(count, room_graph)
    free = np.ones(len(run), bool)
    free[:count] = False
    room = room - sizes[:, :count].sum(axis=1)
    room_graph -= count
    chosen = list(range(count))
    while room_graph > 0:
        fits = free & (sizes <= room[:, None]).all(axis=0)
        if not fits.any():
            break
        best = int(np.argmax(np.where(fits, sizes[1], -1)))
        chosen.append(best)
        free[best] = False
        room, room_graph = room - sizes[:, best], room_graph - 1
    return np.array(chosen, np.int64)


def fill(plan: list[np.ndarray], sizes: Sizes, budget: Budget) -> dict[str, float]:
    """Shares of the padded atoms, edges, graphs and, if there are any, long-range pairs of a plan that are real."""
    return fill_buckets([(0, places) for places in plan], sizes, (budget,))


def fill_buckets(plan: list[tuple[int, np.ndarray]], sizes: Sizes, budgets: Sequence[Budget]) -> dict[str, float]:
    """`fill` of a plan in buckets, over all its batches."""
    chosen = np.concatenate([places for _, places in plan])
    held = {"nodes": sizes.n_node[chosen].sum(), "edges": sizes.n_edge[chosen].sum(), "graphs": len(chosen),
            "pairs": _pairs_of(sizes)[chosen].sum()}
    room = {name: sum(getattr(budgets[bucket], name) for bucket, _ in plan) for name in held}
    return {name: float(held[name] / room[name]) for name in held if room[name]}


def build_batch(columns: Columns, budget: Budget, cutoff: float, reference: np.ndarray | None = None,
                dtype=np.float32, long_range_cutoff: float | None = None, properties: Sequence[str] = ()
                ) -> jraph.GraphsTuple:
    """One padded batch (NumPy arrays) of all structures of `columns`, laid out as graphs/graph.py says.

    Args:
      reference: Reference energy of every element, shape (119,), eV: subtracted in float64.
      dtype: Of all that is floating.
      long_range_cutoff: Å; makes the list of long-range pairs too, which hold all pairs if it is inf.
      properties: Names of labels besides energies and forces: globals["properties"] has those of structures, (G, ...),
        nodes["properties"] those of atoms, (N, ...); NaN where the structures have none.

    Raises:
      ValueError: The structures do not fit into the budget; or an infinite cutoff for a periodic structure.
    """
    n_node = columns.n_atoms
    neighbors = [neighbor_list(positions, cutoff, *box) for positions, *box in each_geometry(columns)]
    n_edge = np.array([len(nb.senders) for nb in neighbors], np.int64)
    if n_node.sum() > budget.nodes - 1 or n_edge.sum() > budget.edges or len(columns) > budget.graphs - 1:
        raise ValueError(f"{len(columns)} structures with {n_node.sum()} atoms and {n_edge.sum()} edges do not "
                         f"fit into {budget}")
    energy = remainders(columns, reference)
    pad = budget.graphs - len(columns)
    made = _concatenate_edges(neighbors, n_node, n_edge, budget, columns.cell is not None)
    edges = {k: made[k] for k in ("pair_order", "shifts") if made[k] is not None}
    if long_range_cutoff is not None:
        edges["long_range"] = _long_range(columns, long_range_cutoff, budget)
    cell = None if columns.cell is None else _pad(columns.cell.astype(dtype), budget.graphs)
    of_graphs, of_nodes = _labels(columns, budget, properties, dtype)
    return jraph.GraphsTuple(
        nodes={"positions": _pad(columns.positions.astype(dtype), budget.nodes),
               "numbers": _pad(columns.numbers.astype(np.int32), budget.nodes),
               "forces": _pad(columns.forces.astype(dtype), budget.nodes), **of_nodes},
        edges=edges, senders=made["senders"], receivers=made["receivers"],
        globals={"energy": _pad(energy.astype(dtype), budget.graphs),
                 "charge": _pad(columns.charge.astype(dtype), budget.graphs),
                 **({} if cell is None else {"cell": cell}), **of_graphs},
        n_node=np.concatenate([n_node, [budget.nodes - n_node.sum()], np.zeros(pad - 1)]).astype(np.int32),
        n_edge=np.concatenate([n_edge, [budget.edges - n_edge.sum()], np.zeros(pad - 1)]).astype(np.int32))


def _labels(columns: Columns, budget: Budget, names: Sequence[str], dtype) -> tuple[dict, dict]:
    """{"properties": ...} of the graphs and of the nodes; {} where there are none."""
    made = []
    for found, length in ((columns.properties, budget.graphs), (columns.atom_properties, budget.nodes)):
        labels = {name: _pad(found[name].astype(dtype), length) for name in names if name in found}
        made.append({"properties": labels} if labels else {})
    return made[0], made[1]


def remainders(columns: Columns, reference: np.ndarray | None) -> np.ndarray:
    """Energies less the reference energies of the elements, (S,) float64 eV."""
    energy = np.array(columns.energy)
    if reference is not None and len(columns):
        energy -= np.add.reduceat(reference[columns.numbers], columns.offsets[:-1])
    return energy


def each_geometry(columns: Columns) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
    """(positions, cell, pbc) of each structure, the latter two None for open boundaries."""
    for s in range(len(columns)):
        atoms = slice(columns.offsets[s], columns.offsets[s + 1])
        periodic = columns.pbc is not None and columns.pbc[s].any()
        yield columns.positions[atoms], columns.cell[s] if periodic else None, columns.pbc[s] if periodic else None


def _long_range(columns, cutoff, budget) -> dict[str, np.ndarray]:
    """Long-range pairs of the batch; padding pairs join the first padding atom to itself."""
    lists = [long_range_list(positions, cutoff, *box) for positions, *box in each_geometry(columns)]
    n_pair = sum(len(pairs[0]) for pairs in lists)
    if n_pair > budget.pairs:
        raise ValueError(f"{len(columns)} structures with {n_pair} long-range pairs do not fit into {budget}")
    padding = np.full(budget.pairs - n_pair, len(columns.numbers), np.int32)
    first_atom = columns.offsets.astype(np.int32)
    out = {name: np.concatenate([*(pairs[k] + a for pairs, a in zip(lists, first_atom)), padding])
           for k, name in enumerate(("receivers", "senders"))}
    if columns.cell is not None:
        rows = [np.zeros((len(pairs[0]), 3), np.int32) if pairs[2] is None else pairs[2] for pairs in lists]
        out["shifts"] = _pad(np.concatenate([np.zeros((0, 3), np.int32), *rows]), budget.pairs)
    return out


def _pad(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _concatenate_edges(neighbors, n_node, n_edge, budget, periodic) -> dict[str, np.ndarray | None]:
    """Edges of the batch; padding edges join the first padding atom to itself, in pairs."""
    first_atom = np.concatenate([[0], np.cumsum(n_node)]).astype(np.int32)
    first_edge = np.concatenate([[0], np.cumsum(n_edge)]).astype(np.int32)
    total, atom = int(first_edge[-1]), first_atom[-1]
    padding = np.full(budget.edges - total, atom, np.int32)
    idle = np.arange(total, budget.edges, dtype=np.int32)

    def joined(name, add):
        return [getattr(nb, name) + a for nb, a in zip(neighbors, add)]

    halves = [np.split(o, 2) for o in joined("pair_order", first_edge)]
    shifts = None
    if periodic:
        rows = [np.zeros((len(nb.senders), 3), np.int32) if nb.shifts is None else nb.shifts for nb in neighbors]
        shifts = _pad(np.concatenate([np.zeros((0, 3), np.int32), *rows]), budget.edges)
    return {
        "senders": np.concatenate(joined("senders", first_atom) + [padding]),
        "receivers": np.concatenate(joined("receivers", first_atom) + [padding]),
        "pair_order": np.concatenate([h[0] for h in halves] + [idle[0::2]] + [h[1] for h in halves] + [idle[1::2]]),
        "shifts": shifts}
