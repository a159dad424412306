"""Tests for files of other programs, which their own packages wrote: see benchmarks/weights.

Each file in tests/importers/files is compressed. The .npz file of the same name contains the
energies, forces and stress of the program for three structures.
"""

import lzma
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax import MLIPCalculator, importers
from mlip_jax.importers import mace
from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats.mace.module import read_module
from mlip_jax.importers.formats.mace.products import align_products
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.structure import Structure
from tests.importers import e3nn_fixtures, test_sevennet
from tests.importers.torch_files import Tensor, module, write

FILES = Path(__file__).with_name("files")
# name of the file: option, model, elements
CASES = {
    "mace.model": ("#head=first", "mace"),
    "mace_one_layer.model": ("#head=second", "mace"),
    "sevennet.pth": ("#modality=R2SCAN", "sevennet"),
    "nequip.ckpt": ("", "nequip"),
    "nequip.nequip.zip": ("", "nequip"),
    "nequip_uneven.ckpt": ("", "nequip"),
    "nequix.nqx": ("", "nequix"),
    "nequix_indexed.nqx": ("", "nequix"),
    "schnetpack_painn": ("", "painn"),
    "schnetpack_schnet.ckpt": ("", "schnet"),
    "torchmdnet.ckpt": ("", "equivariant_transformer"),
}


@pytest.fixture
def unpack(tmp_path):
    """Function that unpacks a file and returns its path."""

    def unpacked(name):
        path = tmp_path / name
        path.write_bytes(lzma.decompress((FILES / f"{name}.xz").read_bytes()))
        return path

    return unpacked


def results_of(potential, name):
    """Return results and reference results, one pair for each structure."""
    with np.load(FILES / f"{name}.npz", allow_pickle=False) as data:
        arrays = dict(data)
    for k in sorted({key.partition("/")[0] for key in arrays}):
        of_one = {key.partition("/")[2]: v for key, v in arrays.items() if key[0] == k}
        structure = Structure(
            of_one["numbers"],
            of_one["positions"],
            cell=of_one.get("cell"),
            pbc=np.ones(3, bool) if "cell" in of_one else None,
        )
        energy = np.atleast_1d(of_one["energy"])
        fixture = e3nn_fixtures.Fixture(
            {}, {}, [structure], energy, of_one["forces"], of_one.get("stress")
        )
        yield e3nn_fixtures.results(potential, fixture), fixture


@pytest.mark.parametrize("name", CASES)
def test_files_are_recognized_by_their_content(unpack, name):
    option, model = CASES[name]
    potential = importers.load_force_field(f"{unpack(name)}{option}")
    assert type(potential.model).__module__ == f"mlip_jax.models.{model}"
    assert {1, 6, 8} <= set(potential.elements)
    assert potential.metadata["file"] == name
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(potential.params))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_give_the_results_of_their_program(unpack, name, double_precision):
    potential = importers.load_force_field(f"{unpack(name)}{CASES[name][0]}")
    for found, fixture in results_of(potential, name):
        e3nn_fixtures.assert_agree(found, fixture, 1e-9)


def test_heads_of_mace(unpack):
    path = unpack("mace.model")
    with pytest.raises(ValueError, match="'first', 'second'.*received None. .*X.model#head=first"):
        mace.load(path)
    second = MLIPCalculator.load(path, head="second").potential
    assert second.energy_scale == 0.9  # of the first head 1.3
    assert second.model.zbl and second.model.distance_transform == "agnesi"
    corrected = importers.load_force_field(f"{path}#head=second#dispersion=r2scan")
    assert corrected.model.model == second.model
    assert dict(dict(corrected.model.terms)["d3"])["functional"] == "r2scan"


def test_signs_of_couplings_are_those_of_the_file(unpack):
    """A file of another version of e3nn has other signs of couplings, and of the weights."""
    state, _ = read_module(torch_file.read(unpack("mace.model")))
    prefix = "products.0.symmetric_contractions.contractions.1."
    flipped = {name: -state[f"{prefix}{name}"] for name in ("U_matrix_3", "weights_max")}
    aligned = align_products(state | {f"{prefix}{k}": v for k, v in flipped.items()})
    weights = f"{prefix}weights_max"
    np.testing.assert_array_equal(align_products(state)[weights], state[weights])
    restored = (aligned[weights] == state[weights]).all(axis=(0, 2))
    vanishing = (aligned[weights] == -state[weights]).all(axis=(0, 2))  # for equal factors
    assert restored.sum() > vanishing.sum() > 0 and (restored ^ vanishing).all()
    with pytest.raises(WeightsError, match="has shape .* another basis"):
        align_products(state | {f"{prefix}U_matrix_3": state[f"{prefix}U_matrix_3"][..., :2]})
    with pytest.raises(WeightsError, match="the couplings are not those of MACE"):
        align_products(state | {f"{prefix}U_matrix_3": 2 * state[f"{prefix}U_matrix_3"]})


REFUSED = {
    "another model": (module("mace.modules.models.EnergyDipolesMACE"), "class mace.*EnergyDipoles"),
    "unknown block": (
        module(
            "mace.modules.models.ScaleShiftMACE",
            children={"radial": module("mace.modules.radial.GaussianBasis")},
        ),
        "radial is a mace.modules.radial.GaussianBasis, which is not supported",
    ),
    "option": (
        module("mace.modules.models.MACE", apply_cutoff=False),
        "option apply_cutoff must be True, received False",
    ),
    "unknown program": (module("other.Model"), "no importer for this file.*class other.Model"),
    "weights only": ({"a": Tensor(np.ones(2), 0)}, "state the program"),
    "aggregation": (
        module(
            "schnetpack.model.base.NeuralNetworkPotential",
            children={
                "out": module("schnetpack.atomistic.atomwise.Atomwise", aggregation_mode="avg")
            },
        ),
        "aggregation_mode of the energy must be 'sum', received 'avg'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rejected_files(tmp_path, name):
    value, message = REFUSED[name]
    path = write(tmp_path / "X.model", value)
    with pytest.raises(WeightsError, match=message):
        importers.load_force_field(path)


def test_settings_of_another_type_are_an_error_with_the_file(unpack, monkeypatch):
    """A corrupted torchmdnet.ckpt had a dict as its activation; the TypeError named no file."""
    path = unpack("torchmdnet.ckpt")
    content = torch_file.read(path)
    content["hyper_parameters"]["activation"] = {}
    monkeypatch.setattr(torch_file, "read", lambda path: content)
    with pytest.raises(WeightsError, match=r"torchmdnet.ckpt: the file is corrupted.*unhashable"):
        importers.load_force_field(path)


def test_options_of_importers(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.model: no such file"):
        importers.load_force_field(tmp_path / "absent.model")
    (tmp_path / "notes.model").write_text("notes")
    with pytest.raises(WeightsError, match="notes.model: a file without a force field; expected"):
        importers.load_force_field(tmp_path / "notes.model")  # used to be "no such directory"
    state, settings = test_sevennet.content("sevennet_linear")
    tensors = {k: Tensor(v, n) for n, (k, v) in enumerate(state.items())}
    content = {"model_state_dict": tensors, "config": settings}
    path = write(tmp_path / "checkpoint.pth", content)
    with pytest.raises(ValueError, match="no modalities, received 'PBE'"):
        importers.load_force_field(f"{path}#modality=PBE")
    with pytest.raises(ValueError, match="no modalities, received 'PBE'"):
        importers.load_force_field(path, modality="PBE")
    with pytest.raises(ValueError, match="unknown options head of the importer sevennet"):
        importers.load_force_field(f"{path}#head=a")
    with pytest.raises(ValueError, match="expected an option NAME=VALUE after '#', received 'PBE'"):
        importers.load_force_field(f"{path}#PBE")
    with pytest.raises(ValueError, match="apply only to importers"):
        importers.load_force_field(tmp_path, head="a")
    assert importers.split_options("a.pt#elements=H+C#energy_unit=0.5") == (
        "a.pt",
        {"elements": ["H", "C"], "energy_unit": 0.5},
    )
