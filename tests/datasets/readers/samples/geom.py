"""GEOM's rdkit_folder with two pickles as "drugs" and a small molecule as "qm9".

The pickles are from NeuralForceField (MIT) in GEOM's schema; their energies are not GEOM's. The
conformers of the small molecule are not in the order of their energies.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "data" / "readers" / "geom"
KCAL_IN_HARTREE = 0.0433641153087705 / 27.211386245988
SMILES = "OCCO"
ENERGIES = [-13.991, -13.995, -13.990, -13.993]  # hartree


def small_molecule() -> dict:
    Chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(SMILES))
    ids = AllChem.EmbedMultipleConfs(molecule, len(ENERGIES), randomSeed=7)
    return {
        "totalconfs": 9,
        "uniqueconfs": 4,
        "temperature": 298.15,
        "lowestenergy": min(ENERGIES),
        "charge": 0,
        "ensembleenergy": 0.5,
        "ensembleentropy": 2.0,
        "ensemblefreeenergy": -0.6,
        "smiles": SMILES,
        "conformers": [
            {
                "geom_id": 100 + i,
                "set": i + 1,
                "degeneracy": i + 1,
                "totalenergy": energy,
                "relativeenergy": (energy - min(ENERGIES)) / KCAL_IN_HARTREE,
                "boltzmannweight": 0.25,
                "conformerweights": [0.25 / (i + 1)] * (i + 1),
                "rd_mol": Chem.Mol(molecule, False, i),
            }
            for i, energy in zip(ids, ENERGIES)
        ],
    }


def make(folder: Path):
    small = small_molecule()
    (folder / "drugs").mkdir()
    (folder / "qm9").mkdir()
    drugs = {}
    for path in sorted(DATA.glob("*.pickle")):
        shutil.copy(path, folder / "drugs")
        drugs[
            "C(#Cc1ccccc1)C[NH+]1CCCCC1" if path.name.startswith("PJ") else "C1CC(CNC2CC2)CO1"
        ] = {"pickle_path": f"drugs/{path.name}", "charge": int(path.name.startswith("PJ"))}
    (folder / "qm9" / "OCCO.pickle").write_bytes(pickle.dumps(small, 3))
    (folder / "summary_drugs.json").write_text(json.dumps(drugs))
    (folder / "summary_qm9.json").write_text(
        json.dumps({SMILES: {"pickle_path": "qm9/OCCO.pickle", "charge": 0}})
    )
    return folder, {}
