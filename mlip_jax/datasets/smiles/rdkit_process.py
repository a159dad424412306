"""Parser of RDKit's binary molecules in a separate process, which may crash.

RDKit's parser is written in C++ and trusts its input: some corrupted molecules crash the
process. The process runs this file as a program. It receives molecules and returns arrays through
pipes, each with its length (8 bytes), and ends when its parent closes the pipe.
"""

from __future__ import annotations

import json
import os
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from typing import BinaryIO

import numpy as np

_SECONDS, _MEMORY = 60.0, 8 * 2**30  # limits of one molecule, and of the process


class RDKitParser:
    """Parser of RDKit's binary molecules. Threads may share it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._owner = 0  # process that started it
        self._lock = threading.Lock()

    def parse(self, binary: bytes) -> tuple[np.ndarray, np.ndarray, float]:
        """Return atomic numbers (n,), positions (Å) (n, 3) and formal charge (e) of a molecule.

        Raises:
          ValueError: RDKit cannot read the molecule, or its process died or took too long.
          ImportError: RDKit is missing.
        """
        with self._lock:
            # a forked process must not share the pipe of its parent
            if self._process is None or self._owner != os.getpid():
                self._start()
            try:
                _send(self._process.stdin, binary)
                reply = self._receive()
            except (OSError, EOFError) as error:
                self._process.kill()
                code = self._process.wait()
                self._process = None
                raise ValueError(f"its process ended with {code}: {error}") from error
        head, _, content = reply.partition(b"\n")
        values = json.loads(head)
        if "missing" in values:
            raise ImportError(values["missing"])
        if "error" in values:
            raise ValueError(values["error"])
        numbers = np.frombuffer(content, np.int32, values["n"])
        positions = np.frombuffer(content, np.float64, 3 * values["n"], 4 * values["n"])
        return numbers.copy(), positions.reshape(-1, 3).copy(), float(values["charge"])

    def _start(self) -> None:
        """Start the process."""
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _receive(self) -> bytes:
        """Return a reply. Raise EOFError or TimeoutError if there is none."""
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + _SECONDS
        data, size = b"", 8
        while len(data) < size:
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"no result within {_SECONDS:g} s")
            part = os.read(descriptor, 1 << 20)
            if not part:
                raise EOFError("RDKit crashed")
            data += part
            if len(data) >= 8:
                size = 8 + struct.unpack("=Q", data[:8])[0]
        return data[8:]


def _send(file: BinaryIO, data: bytes) -> None:
    """Write data with its length."""
    file.write(struct.pack("=Q", len(data)) + data)
    file.flush()


def _reply_to(binary: bytes) -> bytes:
    """Parse a molecule and return the reply."""
    from rdkit import Chem, rdBase

    try:
        with rdBase.BlockLogs():
            molecule = Chem.Mol(binary)
        atoms, conformers = molecule.GetNumAtoms(), molecule.GetNumConformers()
        if conformers != 1 or not atoms:
            raise ValueError(
                f"an RDKit molecule with {atoms} atoms and {conformers} conformers, expected "
                "positions of one"
            )
        numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.int32)
        positions = np.array(molecule.GetConformer().GetPositions(), np.float64)
        head = {"n": atoms, "charge": Chem.GetFormalCharge(molecule)}
        return json.dumps(head).encode() + b"\n" + numbers.tobytes() + positions.tobytes()
    except (RuntimeError, ValueError, MemoryError) as error:
        return json.dumps({"error": str(error) or type(error).__name__}).encode()


def _serve() -> None:
    """Reply to molecules until the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep output of libraries out of replies
    while len(size := source.read(8)) == 8:
        binary = source.read(struct.unpack("=Q", size)[0])
        try:
            reply = _reply_to(binary)
        except ImportError as error:
            reply = json.dumps({"missing": str(error)}).encode()
        _send(target, reply)


if __name__ == "__main__":
    _serve()
