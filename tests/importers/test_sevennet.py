"""Tests for the importers of SevenNet and NequIP: files, settings, pretrained force fields.

tests/models/test_nequip.py compares predictions.
"""

import ast
import io
import os
import pickle
import zipfile
from pathlib import Path
from pickle import _Pickler as PythonPickler  # its methods can be replaced

import jax
import numpy as np
import pytest

from mlip_jax.importers import nequip, sevennet
from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats.weights import WeightsError
from tests.models.test_nequip import assert_agree, crystal, molecules, of_molecules, predict

DATA = Path(__file__).parents[1] / "data"
PRETRAINED = ("0__22May2024", "0__11Jul2024", "l3i5", "MF_0_PBE", "MF_0_R2SCAN")


def content(name):
    """State dict and settings of a fixture."""
    with np.load(DATA / f"parity_{name}.npz") as data:
        state = {
            key.removeprefix("weights/"): data[key] for key in data if key.startswith("weights/")
        }
        return state, ast.literal_eval(str(data["config"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_force_fields(name, double_precision):
    """Golden values are those of sevenn 0.13.0, in float64 with exact couplings."""
    folder = os.environ.get("SEVENNET_PRETRAINED")
    if not folder:
        pytest.skip(
            "set SEVENNET_PRETRAINED to the folder sevenn/pretrained_potentials of the wheel of sevenn 0.13.0"
        )
    with np.load(DATA / f"parity_sevennet_pretrained_{name}.npz") as data:
        arrays = dict(data)
    file = str(arrays["weights_file"]).partition("pretrained_potentials/")[2]
    modality = str(arrays["modal"]) if "modal" in arrays else None
    potential = sevennet.load(Path(folder) / file, modality=modality)
    assert len(potential.elements) == 89
    for k in (0, 1):
        energy, forces, stress = predict(
            potential, [crystal(arrays, k)], np.float64, with_stress=True
        )
        assert_agree(energy, arrays[f"periodic/{k}/energy"], 1e-9)
        assert_agree(forces, arrays[f"periodic/{k}/forces"], 1e-9)
        assert_agree(stress, arrays[f"periodic/{k}/stress"], 1e-9)
    energies, forces, _ = predict(potential, molecules(arrays), np.float64)
    assert_agree(energies, of_molecules(arrays, "energy")[:, 0], 1e-9)
    assert_agree(forces, of_molecules(arrays, "forces"), 1e-9)


class FakeTensor:
    """Pickles as a tensor of torch does."""

    def __init__(self, key, array, stride=None, size=None):
        self.key, self.array = key, array
        self.size = size or array.shape
        self.stride = stride or tuple(s // array.itemsize for s in array.strides)


class FloatStorage:
    """Stands for torch.FloatStorage in a pickle."""


def _rebuild_tensor_v2():
    """Stands for torch._utils._rebuild_tensor_v2 in a pickle."""


def write_torch_file(path, value, other=b""):
    """Write `value` as torch.save does; FakeTensors become tensors."""
    tensors = []

    class Pickler(PythonPickler):
        def save_global(self, obj, name=None):
            modules = {
                FloatStorage: ("torch", "FloatStorage"),
                _rebuild_tensor_v2: ("torch._utils", "_rebuild_tensor_v2"),
            }
            if obj not in modules:
                return super().save_global(obj, name)
            self.write(pickle.GLOBAL + "\n".join(modules[obj]).encode() + b"\n")
            self.memoize(obj)

        dispatch = {
            **PythonPickler.dispatch,
            type: save_global,
            type(_rebuild_tensor_v2): save_global,
        }

        def persistent_id(self, obj):
            return (
                ("storage", FloatStorage, obj.key, "cpu", obj.array.size)
                if isinstance(obj, Storage)
                else None
            )

        def reducer_override(self, obj):
            if not isinstance(obj, FakeTensor):
                return NotImplemented
            tensors.append(obj)
            return _rebuild_tensor_v2, (
                Storage(obj.key, obj.array),
                0,
                obj.size,
                obj.stride,
                False,
                {},
            )

    class Storage:
        def __init__(self, key, array):
            self.key, self.array = key, array

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", other or buffer.getvalue())
        for tensor in tensors:
            archive.writestr(
                f"archive/data/{tensor.key}", np.ascontiguousarray(tensor.array).tobytes()
            )


def test_checkpoint_without_torch(tmp_path):
    """A checkpoint gives the same force field as its arrays."""
    state, settings = content("sevennet_linear")
    state = {name: array.astype(np.float32) for name, array in state.items()}
    tensors = {name: FakeTensor(str(k), array) for k, (name, array) in enumerate(state.items())}
    write_torch_file(
        tmp_path / "checkpoint.pth", {"model_state_dict": tensors, "config": settings, "epoch": 3}
    )
    loaded, expected = (
        sevennet.load(tmp_path / "checkpoint.pth"),
        sevennet.potential(state, settings),
    )
    assert loaded.model == expected.model and loaded.elements == (1, 6, 7, 8, 16)
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.savez(tmp_path / "weights.npz", **state)
    assert sevennet.load(tmp_path / "weights.npz", settings).model == expected.model
    with pytest.raises(ValueError, match="give config"):
        sevennet.load(tmp_path / "weights.npz")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_checkpoints_run_nothing(tmp_path, monkeypatch):
    """Catches a reader that imports what the file names, or reads beyond its numbers."""
    monkeypatch.chdir(tmp_path)
    write_torch_file("evil.pth", {}, pickle.dumps(Malicious(), 2))
    with pytest.raises(WeightsError, match="the pickle requests '(posix|nt).system'"):
        torch_file.read("evil.pth")
    assert not Path("executed").exists()
    array = np.arange(4, dtype=np.float32)
    for tensor in (
        FakeTensor("0", array, size=(5,)),
        FakeTensor("0", array, stride=(4,)),
        FakeTensor("0", array, size=(-1,)),
        FakeTensor("0", array, stride=(-1,)),
    ):
        write_torch_file("beyond.pth", {"a": tensor})
        with pytest.raises(WeightsError, match="a tensor of shape"):
            torch_file.read("beyond.pth")
    Path("other.pth").write_bytes(b"not an archive")
    with pytest.raises(WeightsError, match="cannot be read as a file of torch.save"):
        torch_file.read("other.pth")
    write_torch_file("plain.pth", [1, 2])
    with pytest.raises(WeightsError, match="not a checkpoint of sevenn"):
        sevennet.load("plain.pth")
    with pytest.raises(FileNotFoundError):
        torch_file.read("absent.pth")


def test_settings_that_are_not_supported():
    state, settings = content("sevennet_linear")
    for change, message in (
        ({"use_bias_in_linear": True}, "setting use_bias_in_linear must be False"),
        ({"cutoff_function": {"cutoff_function_name": "cosine"}}, "radial basis and cutoff"),
        ({"irreps_manual": ["12x0e", "12x0e+6x1o", "12x0e"]}, "irreps_manual must be"),
        ({"num_convolution_layer": 4}, "it is not that of SevenNet, or incomplete"),
        ({"lmax": 1, "irreps_manual": False}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            sevennet.potential(state, settings | change)
    with pytest.raises(ValueError, match="this force field has no modalities, received 'PBE'"):
        sevennet.potential(state, settings, "PBE")
    with pytest.raises(
        ValueError, match=r"modality must be one of \['PBE'\] for this force field, received None"
    ):
        sevennet.potential(state, settings | {"_modal_map": {"PBE": 0}})
    with pytest.raises(WeightsError, match="have no counterpart in SevenNet"):
        sevennet.potential(state | {"extra.weight": np.zeros(3)}, settings)


def test_arguments_of_nequip_that_are_not_supported(tmp_path):
    state, settings = content("nequip_even")
    for change, message in (
        ({"r_max": None}, "lack r_max"),
        ({"pair_potential": "ZBL"}, "pair_potential must be None"),
        ({"future": 1}, "arguments future of the model are not supported"),
        ({"type_names": ["H", "Xx"]}, "expected chemical symbols, received 'Xx'"),
        (
            {"feature_irreps_hidden": ["8x0e+8x1o", "8x0o"]},
            r"the last one with scalars \(0e\) only",
        ),
        ({"irreps_edge_sh": "1x0e+1x2e"}, "one irrep for each degree"),
    ):
        with pytest.raises(ValueError, match=message):
            nequip.potential(state, settings | change)
    with pytest.raises(WeightsError, match="is not that of NequIP"):
        nequip.potential({"weight": np.zeros(2)}, settings)
    np.savez(
        tmp_path / "weights.npz",
        **{f"model.sole_model.{name}": array for name, array in state.items()},
    )
    (tmp_path / "model.yaml").write_text(str(settings))  # a dict of Python is YAML
    loaded = nequip.load(tmp_path / "weights.npz", tmp_path / "model.yaml", energy_unit=2.0)
    assert (
        loaded.energy_scale == 2.0 and loaded.reference_energies[6] == -4.0 and loaded.cutoff == 4.5
    )
