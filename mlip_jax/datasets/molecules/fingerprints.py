"""Morgan fingerprints of molecules."""

from __future__ import annotations

from typing import Any

RADIUS, NUM_BITS = 2, 2048  # as ECFP4


def morgan_fingerprint(mol: Any) -> Any:
    """Return the Morgan fingerprint of an RDKit molecule, an ExplicitBitVect of 2048 bits."""
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    return GetMorganGenerator(radius=RADIUS, fpSize=NUM_BITS).GetFingerprint(mol)
