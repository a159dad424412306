"""Read corrupted copies of the sample of each target for some time: `make fuzz SECONDS=600`.

The targets are the readers, and further kinds of files (targets.py). Each target has one process at
a time (mutation.py), which is restarted after a file that crashed it.
The exit code is 1 if a file crashed its process, exceeded a limit, acted outside of its folder, or
raised another error than that of its kind. Each is reported with its seed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).with_name("mutation.py")
sys.path.insert(0, str(PROGRAM.parents[2]))

from tests.hostile.targets import TARGETS

READERS = sorted(p.stem for p in (PROGRAM.parents[1] / "datasets/readers/samples").glob("*.py"))
NAMES = [*READERS, *TARGETS]
_FILES = 500  # files of one process


def problems_of(name: str, seconds: float, seed: int = 0) -> tuple[list[str], int]:
    """Read corrupted copies of the sample of a target for some time.

    Returns:
      The problems, and the number of files.
    """
    first, problems, deadline = seed, [], time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(PROGRAM), folder, name, str(_FILES), str(seed)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            try:
                output, _ = process.communicate(timeout=max(left, 1))
                ended = True
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                ended = False  # by this function, at the end of the time
        lines = output.decode().splitlines()
        reports = [json.loads(line) for line in lines if line.startswith("{") and line[-1] == "}"]
        problems += [f"{name}: {json.dumps(r)}" for r in reports if "problem" in r]
        seed = max([seed, *(r["seed"] + 1 for r in reports)])
        if ended and lines[-1:] != ["done"]:
            problems.append(f"{name}: seed {seed - 1} ended the process ({process.returncode})")
            if not reports:  # the sample itself
                return problems, seed - first
    return problems, seed - first


def main() -> None:
    """Run all targets one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="time per target")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("targets", nargs="*", default=NAMES)
    arguments = parser.parse_args()
    problems = []
    for name in arguments.targets:
        reports, count = problems_of(name, arguments.seconds, arguments.seed)
        if not count and not reports:
            reports = [f"{name}: the time is too short to read a file"]
        head = f"{name}: {count} files in {arguments.seconds:g} s, {len(reports)} problems"
        print(head, *reports, sep="\n  ", flush=True)
        problems += reports
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
