"""Markdown tables of the results of benchmarks/models.py.

A line of results is a dictionary with `part`, `case`, `round`, `batch`, and the measured values or
`failed` with the reason.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, is_ours
from benchmarks.machine import spread

Line = dict[str, Any]
_ORDER = {case.name: number for number, case in enumerate(CASES)}
_PEER = {case.name: case.peer for case in CASES}
_IS_OURS = {case.name: is_ours(case) for case in CASES}


def read(path: Path) -> list[Line]:
    """Read the lines of a results file."""
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def last_result(output: str) -> Line:
    """Return the last result in the output of a measuring process, which may contain other lines.

    Raises:
      ValueError: There is no result.
    """
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise ValueError("the process printed no result")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def summary(values: Sequence[float | None]) -> str:
    """Format values as "median (lowest to highest)", a single value, or "-" for none."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return spread(known) if len(known) > 1 else f"{known[0]:,.4g}"


def ratios(
    lines: Sequence[Line], value: Callable[[Line], float], case: str, peer: str
) -> list[float]:
    """Return the ratios of `value` of a case to that of a peer, for rounds with both."""
    by_round = {
        name: {line["round"]: value(line) for line in lines if line["case"] == name}
        for name in (case, peer)
    }
    return [
        by_round[case][r] / by_round[peer][r] for r in sorted(by_round[case]) if r in by_round[peer]
    ]


def fastest_peer(lines: Sequence[Line], milliseconds: Callable[[Line], float]) -> str:
    """Return the name of the fastest case of another package, "" if there is none."""
    times: dict[str, list[float]] = {}
    for line in lines:
        if not _IS_OURS[line["case"]]:
            times.setdefault(line["case"], []).append(milliseconds(line))
    return min(times, key=lambda name: statistics.median(times[name]), default="")


def report(lines: Sequence[Line]) -> str:
    """Return the tables of all parts that have results."""
    failed = {(line["part"], line["case"]): line["failed"] for line in lines if "failed" in line}
    good = [line for line in lines if "failed" not in line]
    parts = {
        name: [line for line in good if line["part"] == name]
        for name in {line["part"] for line in good}
    }
    sections = [
        f"Measured on {machine}." for machine in dict.fromkeys(line["machine"] for line in good)
    ]
    for batch in sorted({line["batch"] for line in parts.get("train", ())}):
        sections += [
            f"Training step, batch {batch}:",
            training([line for line in parts["train"] if line["batch"] == batch]),
        ]
    for name, make in (("latency", latency), ("repeat", repeat), ("roofline", roofline)):
        if name in parts:
            sections += [f"{name.capitalize()}:", make(parts[name])]
    sections += [
        f"Not measured: {part} of {case}: {reason}" for (part, case), reason in failed.items()
    ]
    return "\n\n".join(sections)


def _by_case(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    names = sorted({line["case"] for line in lines}, key=_ORDER.__getitem__)
    return [(name, [line for line in lines if line["case"] == name]) for name in names]


def training(lines: Sequence[Line]) -> str:
    """Return the table of part `train`, with ratios of processor time (on a GPU: wall time)."""

    def rate(line):
        return line["structures_per_cpu_s" if line["device"] == "cpu" else "structures_per_s"]

    rows = []
    for name, of_case in _by_case(lines):
        counted = [line for line in of_case if line.get("flops") is not None]
        rows.append(
            [
                name,
                summary(
                    [
                        line["real_per_batch"]["edges"] / line["real_per_batch"]["structures"]
                        for line in of_case[:1]
                    ]
                ),
                *(
                    summary([line[key] for line in of_case])
                    for key in ("structures_per_s", "structures_per_cpu_s")
                ),
                _ratio(lines, rate, name, _PEER[name]),
                summary([line["step_ms"]["median"] for line in of_case]),
                summary([_memory(line) for line in of_case]),
                summary(
                    [1024 * _memory(line) / line["real_per_batch"]["atoms"] for line in of_case]
                ),
                summary([line["compile_cpu_s"] for line in of_case]),
                summary([line["flops"] / 1e9 for line in counted[:1]]),
                summary([line["bytes"] / 1e9 for line in counted[:1]]),
                f"{of_case[0]['parameters']:,}",
            ]
        )
    return markdown(
        (
            "model",
            "edges/structure",
            "structures/s",
            "structures/CPU-s",
            "to its peer",
            "step, ms",
            "peak MiB",
            "KiB/atom",
            "compilation, CPU-s",
            "GFLOP/step",
            "GB/step",
            "parameters",
        ),
        rows,
    )


def _memory(line: Line) -> float:
    return line["peak_mib"] if line.get("peak_device_mib") is None else line["peak_device_mib"]


def _ratio(lines: Sequence[Line], value: Callable[[Line], float], case: str, peer: str) -> str:
    values = ratios(lines, value, case, peer) if peer else []
    return f"{summary(values)} × {peer}" if values else "-"


def latency(lines: Sequence[Line]) -> str:
    """Return the table of part `latency`, with ratios of wall time; below 1 is faster."""
    rows = []
    for system in dict.fromkeys(name for line in lines for name in line["systems"]):
        of_system = [line for line in lines if system in line["systems"]]

        def milliseconds(line, system=system):
            return line["systems"][system]["ms"]["median"]

        best = fastest_peer(of_system, milliseconds)
        for name, of_case in _by_case(of_system):
            rows.append(
                [
                    f"{of_case[0]['systems'][system]['atoms']:,}",
                    name,
                    summary([milliseconds(line) for line in of_case]),
                    summary([line["systems"][system]["cpu_ms"] for line in of_case]),
                    summary([line["systems"][system]["first_s"] for line in of_case]),
                    _ratio(of_system, milliseconds, name, _PEER[name]),
                    _ratio(of_system, milliseconds, name, best) if _IS_OURS[name] else "-",
                ]
            )
    return markdown(
        (
            "atoms",
            "model",
            "call, ms",
            "CPU, ms",
            "first call, s",
            "to its peer",
            "to the fastest peer",
        ),
        rows,
    )


def repeat(lines: Sequence[Line]) -> str:
    """Return the table of part `repeat`, which states whether the hashes of all rounds agree."""
    rows = []
    for name, of_case in _by_case(lines):
        for quantity in of_case[0]["hashes"]:
            hashes = [line["hashes"][quantity] for line in of_case]
            verdict = (
                "one run only"
                if len(hashes) == 1
                else "identical"
                if len(set(hashes)) == 1
                else "DIFFERENT"
            )
            rows.append([name, quantity, str(len(hashes)), verdict, hashes[0][:12]])
    return markdown(("model", "quantity", "processes", "bits", "hash"), rows)


def roofline(lines: Sequence[Line]) -> str:
    """Return the table of part `roofline`: fractions of the FLOP/s and bytes/s of the device."""
    rows = []
    for name, of_case in _by_case(lines):
        for batch in sorted({line["batch"] for line in of_case}):
            of_batch = [line for line in of_case if line["batch"] == batch]
            shares = [share(line) for line in of_batch]
            first = of_batch[0]
            rows.append(
                [
                    name,
                    str(batch),
                    summary([line["structures_per_s"] for line in of_batch]),
                    summary([first["flops"] / 1e9]),
                    summary([first["bytes"] / 1e9]),
                    summary([100 * s["flops"] for s in shares]),
                    summary([100 * s["bytes"] for s in shares]),
                    "bytes" if shares[0]["bytes"] > shares[0]["flops"] else "FLOPs",
                ]
            )
    head = [
        f"{line['limits']['kind']}: {line['limits']['flops_per_s'] / 1e9:,.4g} GFLOP/s in a matrix "
        f"product, {line['limits']['bytes_per_s'] / 1e9:,.4g} GB/s in a copy"
        for line in lines
    ]
    return "\n\n".join(
        (
            head[0],
            markdown(
                (
                    "model",
                    "batch",
                    "structures/s",
                    "GFLOP/step",
                    "GB/step",
                    "% of the FLOP/s",
                    "% of the bytes/s",
                    "bound by",
                ),
                rows,
            ),
        )
    )


def share(line: Line) -> dict[str, float]:
    """Return the fractions of the device's FLOP/s and bytes/s that a training step uses.

    The larger one is the fraction of the roofline. On a CPU, rates are per second of processor
    time.
    """
    if line["device"] == "cpu":
        seconds = line["real_per_batch"]["structures"] / line["structures_per_cpu_s"]
    else:
        seconds = line["step_ms"]["median"] / 1e3
    return {key: line[key] / seconds / line["limits"][f"{key}_per_s"] for key in ("flops", "bytes")}
