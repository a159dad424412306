"""The program of the process of native parsers. It replies to the requests of process.py.

It is run as a file and imports only the parsers that it needs, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import signal
import struct
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np

_MEMORY = 8 * 2**30  # limit of the process
# Files up to this size are read completely. Of larger ones, the first members and rows are read.
SMALL_HDF5, SMALL_SQLITE = 2**20, 2**28
_FIRST_MEMBERS, _FIRST_ROWS = 50, 1000
MANY_CHUNKS = 10_000  # of an HDF5 array; more must have stored values
_MAX_BYTES = 2**30  # of an array that is read
_GAP = 3.0  # distance (Å) between the fragments of a salt or solvate; ETKDG lets them overlap
_ERRORS = (
    *(OSError, KeyError, RuntimeError, TypeError, ValueError, IndexError),
    *(MemoryError, AttributeError, OverflowError),
)


def read_rdkit_binaries(*binaries: bytes) -> list[bytes]:
    """Return three parts for each molecule: charge and error, atomic numbers, positions (Å).

    The error is empty if RDKit can read the molecule.
    """
    reply = []
    for binary in binaries:
        try:
            charge, numbers, positions = _read_rdkit_binary(binary)
            reply += [struct.pack("=q", charge), numbers.tobytes(), positions.tobytes()]
        except (RuntimeError, ValueError, MemoryError) as error:
            reply += [bytes(8) + (str(error) or type(error).__name__).encode(), b"", b""]
    return reply


def _read_rdkit_binary(binary: bytes) -> tuple[int, np.ndarray, np.ndarray]:
    """Return formal charge (e), atomic numbers and positions (Å) of a molecule."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.Mol(binary)
    atoms, conformers = molecule.GetNumAtoms(), molecule.GetNumConformers()
    if conformers != 1 or not atoms:
        raise ValueError(
            f"an RDKit molecule with {atoms} atoms and {conformers} conformers, expected positions "
            "of one"
        )
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.int32)
    positions = np.array(molecule.GetConformer().GetPositions(), np.float64)
    return Chem.GetFormalCharge(molecule), numbers, positions


def check_smiles(smiles: bytes) -> list[bytes]:
    """Parse a SMILES and write it again, as the other modules do. Invalid SMILES are no errors."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        _write_and_expand(Chem.MolFromSmiles(smiles.decode("utf-8", "surrogatepass")))
    return []


def check_mol_block(block: bytes) -> list[bytes]:
    """Parse a mol block and write its SMILES. Invalid blocks are no errors."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        text = block.decode("utf-8", "surrogatepass")
        _write_and_expand(Chem.MolFromMolBlock(text, removeHs=False))
    return []


def _write_and_expand(molecule) -> None:
    """Write the SMILES of a molecule, and add hydrogens to it."""
    from rdkit import Chem

    if molecule is not None:
        Chem.MolToSmiles(Chem.RemoveHs(molecule))
        Chem.AddHs(molecule)


def identify_smiles(smiles: bytes) -> list[bytes]:
    """Return the canonical SMILES without stereochemistry, isotopes and explicit hydrogens.

    The reply is empty if RDKit cannot read the SMILES.
    """
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles.decode("utf-8", "surrogatepass"))
        if molecule is None:
            return []
        may_have = re.search(rb"\[[\dDT]", smiles)  # the loop takes a tenth of the time
        labeled = [a for a in molecule.GetAtoms() if a.GetIsotope()] if may_have else []
        for atom in labeled:
            atom.SetIsotope(0)
        if labeled:  # isotopes of hydrogen have become ordinary hydrogens
            molecule = Chem.RemoveHs(molecule)
        return [Chem.MolToSmiles(molecule, isomericSmiles=False).encode()]


def embed(binary: bytes, count: bytes, seed: bytes, timeout: bytes, mmff: bytes) -> list[bytes]:
    """Embed conformers of a molecule by ETKDGv3, from random coordinates if the default ones fail.

    Args:
      binary: Molecule with all hydrogens in RDKit's binary form.
      count: Number of conformers; this and the following are decimal numbers.
      seed: Seed.
      timeout: Time limit of each of the two attempts (s).
      mmff: 1 to relax the conformers with MMFF94 if it has parameters for the molecule.

    Returns:
      b"1" if the conformers were relaxed, and the positions (Å) of each conformer, float64.
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDistGeom

    with rdBase.BlockLogs():
        molecule, options = Chem.Mol(binary), rdDistGeom.ETKDGv3()
        options.randomSeed, options.numThreads, options.timeout = int(seed), 1, int(timeout)
        if not len(rdDistGeom.EmbedMultipleConfs(molecule, int(count), options)):
            options.useRandomCoords = True
            rdDistGeom.EmbedMultipleConfs(molecule, int(count), options)
        fragments = Chem.GetMolFrags(molecule)
        for conformer in molecule.GetConformers() if len(fragments) > 1 else ():
            conformer.SetPositions(_side_by_side(conformer.GetPositions(), fragments))
        relaxed = molecule.GetNumConformers() > 0 and int(mmff) and _relax(molecule)
        positions = [conformer.GetPositions() for conformer in molecule.GetConformers()]
    return [b"1" if relaxed else b"", *(np.asarray(p, np.float64).tobytes() for p in positions)]


def _side_by_side(positions: np.ndarray, fragments) -> np.ndarray:
    """Return positions (Å), (n, 3), with the fragments in a row along x, separated by a gap."""
    positions, edge = positions.copy(), 0.0
    for atoms in map(list, fragments):
        positions[atoms] -= positions[atoms].mean(0)
        positions[atoms, 0] += edge - positions[atoms, 0].min()
        edge = positions[atoms, 0].max() + _GAP
    return positions


def _relax(molecule) -> bool:
    """Relax all conformers with MMFF94. Return False if it lacks parameters for the molecule."""
    from rdkit.Chem import rdForceFieldHelpers as helpers

    # Older versions register its classes only on this import.
    from rdkit.ForceField import rdForceField  # noqa: F401

    if not helpers.MMFFHasAllMoleculeParams(molecule):
        return False
    helpers.MMFFOptimizeMoleculeConfs(molecule, numThreads=1, maxIters=1000)
    return True


def read_hdf5(path: bytes, growing: bytes = b"") -> list[bytes]:
    """Read an HDF5 file, or the beginning of a large one. Errors are left to the reader.

    Files that another process may append to are opened as by the reader of trajectories. HDF5 then
    reads corrupted parts again and again, which can take hours.
    """
    import h5py

    left = sys.maxsize if os.stat(path).st_size <= SMALL_HDF5 else _FIRST_MEMBERS
    with contextlib.suppress(*_ERRORS), _open_hdf5(path, bool(growing)) as file:
        groups, visited = [file["/"].id], set()
        while groups and left:
            group = groups.pop()
            names: list[bytes] = []
            with contextlib.suppress(*_ERRORS):
                names = list(group)
            for name in names[:left]:
                left -= 1
                with contextlib.suppress(*_ERRORS):
                    # other links may lead to other files
                    if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                        continue
                    member = h5py.h5o.open(group, name)
                    if isinstance(member, h5py.h5d.DatasetID):
                        _read_hdf5_array(member)
                    elif isinstance(member, h5py.h5g.GroupID):
                        info = h5py.h5o.get_info(member)
                        if (info.fileno, info.addr) not in visited:  # links can form circles
                            groups.append(member)
                        visited.add((info.fileno, info.addr))
    return []


def _open_hdf5(path: bytes, growing: bool):
    """Open a file for reading."""
    import h5py

    options = dict(libver="latest", swmr=True, locking=False) if growing else {}
    return h5py.File(path, "r", **options)


def _read_hdf5_array(array) -> None:
    """Read the attributes and values of an array, unless it is large or refers to other files."""
    import h5py

    for index in range(h5py.h5a.get_num_attrs(array)):
        attribute = h5py.h5a.open(array, index=index)
        if attribute.shape is not None and math.prod(attribute.shape) <= 1000:
            attribute.read(np.empty(attribute.shape, attribute.dtype))
    properties = array.get_create_plist()
    layout = properties.get_layout()
    elsewhere = layout == h5py.h5d.VIRTUAL or (
        layout == h5py.h5d.CONTIGUOUS and properties.get_external_count()
    )
    shape, dtype = array.shape, array.dtype
    if shape is None or elsewhere or math.prod(shape) * dtype.itemsize > _MAX_BYTES:
        return
    if layout == h5py.h5d.CHUNKED:
        chunks = math.prod(-(-n // c) for n, c in zip(shape, properties.get_chunk()))
        if chunks > max(array.get_storage_size(), MANY_CHUNKS):  # the reader rejects it
            return
    if math.prod(shape):
        array.read(h5py.h5s.ALL, h5py.h5s.ALL, np.empty(shape, dtype))


def read_sqlite(path: bytes) -> list[bytes]:
    """Read an ASE database, or the first rows of a large one. Errors are left to the reader."""
    import sqlite3

    rows = sys.maxsize if os.stat(path).st_size <= SMALL_SQLITE else _FIRST_ROWS
    with contextlib.suppress(sqlite3.Error, *_ERRORS):
        with contextlib.closing(connect_sqlite(Path(os.fsdecode(path)), 2**30)) as connection:
            for table in tables_of(connection) & {"information", "systems"}:
                cursor = connection.execute(f"SELECT * FROM {table} LIMIT {rows}")
                while cursor.fetchone() is not None:
                    pass
    return []


def connect_sqlite(path: Path, longest: int):
    """Open an SQLite file of other people for reading.

    The settings are those that SQLite recommends for such files: computed values cannot use functions
    with side effects, and the layout is checked.

    Args:
      path: Path of the file.
      longest: Maximum number of bytes of a value, also of a computed one.
    """
    import sqlite3

    # `immutable` needs no lock files, as on read-only media, but ignores a log next to the file.
    options = "mode=ro" if has_journal(path) else "mode=ro&immutable=1"
    uri = f"file:{urllib.parse.quote(str(path.absolute()))}?{options}"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


def has_journal(path: Path) -> bool:
    """Return whether an interrupted writer left a write-ahead log or a journal next to the file."""
    companions = (path.with_name(path.name + end) for end in ("-wal", "-journal"))
    return any(p.exists() and p.stat().st_size for p in companions)


def tables_of(connection) -> set[str]:
    """Return the names of the tables, without virtual ones, which are code of extensions."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0"
    return {name for (name,) in connection.execute(query)}


PARSERS: dict[bytes, Callable[..., list[bytes]]] = {
    function.__name__.encode(): function
    for function in (
        check_mol_block,
        check_smiles,
        embed,
        identify_smiles,
        read_hdf5,
        read_rdkit_binaries,
        read_sqlite,
    )
}


def pack(parts: list[bytes]) -> bytes:
    """Return byte strings as one message with its length."""
    lengths = struct.pack(f"={len(parts) + 1}Q", len(parts), *map(len, parts))
    content = b"".join([lengths, *parts])
    return struct.pack("=Q", len(content)) + content


def unpack(content: bytes) -> list[bytes]:
    """Return the byte strings of a message without its length."""
    (count,) = struct.unpack_from("=Q", content)
    parts, start = [], 8 * (count + 1)
    for length in struct.unpack_from(f"={count}Q", content, 8):
        parts.append(content[start : start + length])
        start += length
    return parts


def _reply_to(content: bytes) -> list[bytes]:
    """Return the reply to a request, which begins with the parser and a time limit (s)."""
    parser, seconds, *parts = unpack(content)
    # Ends the process also in native code, in case its parent was killed and cannot do so.
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    try:
        return [b"ok", *PARSERS[parser](*parts)]
    except ImportError as error:
        return [b"missing", str(error).encode()]
    except Exception as error:  # RDKit raises RuntimeError, ValueError and its own classes
        return [b"error", (str(error) or type(error).__name__).encode("utf-8", "replace")]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve() -> None:
    """Say that the process has started, and reply to requests until the pipe is closed."""
    # The parent handles stop requests, which terminals and schedulers send to all processes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _, limit = resource.getrlimit(resource.RLIMIT_AS)  # that of the user may be lower
    memory = _MEMORY if limit == resource.RLIM_INFINITY else min(_MEMORY, limit)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep output of libraries out of replies
    target.write(pack([b"started"]))
    target.flush()
    while len(size := source.read(8)) == 8:
        content = source.read(struct.unpack("=Q", size)[0])
        target.write(pack(_reply_to(content)))
        target.flush()


if __name__ == "__main__":
    _serve()
