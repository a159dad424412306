"""Print the comparison of ours.py with original.py: `comparison.py relax|neb ORIGINAL.jsonl OURS.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

LIMIT = 1.0  # meV/atom (relax) or meV (neb)


def read(path: str) -> dict[str, dict]:
    """Return the lines of a file by name."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return {line["name"]: line for line in lines}


def relax(original: dict, ours: dict) -> None:
    """Print a row per kind of structure, the deviations above the limit, and the totals."""
    total = ours.pop("all")
    difference = {
        name: 1e3 * (ours[name]["energy"] - line["energy"]) / line["atoms"]
        for name, line in original.items()
    }
    print("| structures | number | same minimum | steps of ASE, of mlip_jax |\n|---|---|---|---|")
    for kind in dict.fromkeys(line["kind"] for line in original.values()):
        names = [name for name, line in original.items() if line["kind"] == kind]
        same = sum(abs(difference[name]) < LIMIT for name in names)
        steps = [sum(lines[name]["steps"] for name in names) for lines in (original, ours)]
        print(f"| {kind} | {len(names)} | {same} | {steps[0]}, {steps[1]} |")
    near = [abs(d) for d in difference.values() if abs(d) < LIMIT]
    print(f"\nsame minima: at most {max(near):.2g} meV/atom")
    for name, d in difference.items():
        if not abs(d) < LIMIT:
            print(f"other minimum: {name}: {d:+.2f} meV/atom; {ours[name]['status']}")
    failed = [name for lines in (original, ours) for name, x in lines.items() if not x["converged"]]
    print("not converged:", ", ".join(failed) or "none")
    seconds = sum(line["cpu_s"] for line in original.values())
    print(
        f"CPU s: original {seconds:.1f}, mlip_jax {total['cpu_s']:.1f} "
        f"(with compilation {total['first_cpu_s']:.1f}), ratio {seconds / total['cpu_s']:.2f}"
    )


def neb(original: dict, ours: dict) -> None:
    """Print a row per reaction."""
    total = ours.pop("all")
    print(
        "| reaction | barrier (eV) | difference (meV) | steps of ASE, of mlip_jax |\n|---|---|---|---|"
    )
    for name, line in original.items():
        difference = 1e3 * (ours[name]["barrier"] - line["barrier"])
        steps = f"{line['steps']}, {ours[name]['steps']}"
        print(f"| {name} | {line['barrier']:.4f} | {difference:+.2g} | {steps} |")
    seconds = sum(line["cpu_s"] for line in original.values())
    print(f"CPU s: original {seconds:.1f}, mlip_jax with compilation {total['first_cpu_s']:.1f}")


if __name__ == "__main__":
    {"relax": relax, "neb": neb}[sys.argv[1]](read(sys.argv[2]), read(sys.argv[3]))
