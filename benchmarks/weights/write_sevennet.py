"""Write checkpoints of SevenNet with random weights, and the results of sevenn for them.

Runs with sevenn 0.13.0: `python write_sevennet.py FOLDER`.
"""

import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import sevenn._const as const
import sevenn._keys as KEY
import torch
from ase.data import atomic_numbers
from sevenn.atom_graph_data import AtomGraphData
from sevenn.model_build import build_E3_equivariant_model
from sevenn.train.dataload import unlabeled_atoms_to_graph
from structures import structures, write_results

SYMBOLS = ("C", "H", "O")
CUTOFF = 3.5
CASES = {
    "nequip": {KEY.SELF_CONNECTION_TYPE: "nequip", KEY.IS_PARITY: True},
    "linear": {KEY.SELF_CONNECTION_TYPE: "linear", KEY.IS_PARITY: False, KEY.LMAX: 2},
    "xplor": {
        KEY.IS_PARITY: False,
        KEY.CUTOFF_FUNCTION: {"cutoff_function_name": "XPLOR", "cutoff_on": 3.0},
    },
    "modal": {
        KEY.USE_MODALITY: True,
        KEY.NUM_MODALITIES: 2,
        KEY.MODAL_MAP: {"PBE": 0, "R2SCAN": 1},
        KEY.USE_MODAL_SELF_INTER_INTRO: True,
        KEY.USE_MODAL_SELF_INTER_OUTRO: True,
        KEY.USE_MODAL_OUTPUT_BLOCK: True,
        KEY.USE_MODAL_WISE_SHIFT: True,
        KEY.SHIFT: [[-1.0, -2.0, -3.0], [-1.5, -2.5, -3.5]],
        KEY.IS_PARITY: False,
    },
}


def settings(changes):
    """Return the settings of a model."""
    config = deepcopy(const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG)
    config.update(deepcopy(const.DEFAULT_DATA_CONFIG))
    config.update(deepcopy(const.DEFAULT_TRAINING_CONFIG))
    numbers = sorted(atomic_numbers[s] for s in SYMBOLS)
    config.update(
        {
            KEY.CUTOFF: CUTOFF,
            KEY.CHEMICAL_SPECIES: list(SYMBOLS),
            KEY.NUM_SPECIES: len(SYMBOLS),
            KEY.TYPE_MAP: {z: k for k, z in enumerate(numbers)},
            KEY.NODE_FEATURE_MULTIPLICITY: 4,
            KEY.NUM_CONVOLUTION: 2,
            KEY.LMAX: 1,
            KEY.CONVOLUTION_WEIGHT_NN_HIDDEN_NEURONS: [8],
            KEY.CONV_DENOMINATOR: 6.0,
            KEY.SHIFT: [-1.0, -2.0, -3.0],
            KEY.SCALE: 1.3,
            "version": "0.13.0",
        }
    )
    config.update(changes)
    return config


def results(model, modality):
    """Return energy, forces and stress of each structure."""
    outputs = []
    for atoms in structures():
        graph = unlabeled_atoms_to_graph(atoms, CUTOFF)
        data = AtomGraphData.from_numpy_dict(dict(graph))
        if modality is not None:
            data[KEY.DATA_MODALITY] = modality
        for key, value in graph.items():  # sevenn casts them to single precision
            if isinstance(value, np.ndarray | np.floating) and value.dtype.kind == "f":
                data[key] = torch.as_tensor(np.asarray(value, np.float64))
        out = model(data)
        energy, forces = out[KEY.PRED_TOTAL_ENERGY].item(), out[KEY.PRED_FORCE].detach().numpy()
        xx, yy, zz, xy, yz, zx = (-out[KEY.PRED_STRESS].detach().numpy()).ravel()
        stress = [[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]] if atoms.pbc.all() else None
        outputs.append((atoms, (energy, forces, stress)))
    return outputs


def main(folder):
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # sevenn casts the elements to single precision
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in CASES.items():
        torch.manual_seed(0)
        config = settings(changes)
        model = build_E3_equivariant_model(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        torch.save(
            {"model_state_dict": model.state_dict(), "config": config, "epoch": 1},
            folder / f"{name}.pth",
        )
        model.set_is_batch_data(False)
        for modality in config.get(KEY.MODAL_MAP) or [None]:
            path = folder / f"{name}{f'_{modality}' if modality else ''}.npz"
            write_results(path, results(model, modality))
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
