"""Tests for PaiNN and SchNet with SchNetPack's weights.

The golden values tests/data/parity_schnetpack_*.npz are reference outputs of SchNetPack 2.1.1 (with
torch 2.13) in float64, for small models with random weights that are stored as float32 numbers.
"schnet": 12 features, 8 filters, Gaussians, cosine cutoff of 4.2 Å, mean and atomic references.
"painn": Gaussians, cosine cutoff, mean. "painn_shared": shared interactions and filters, Bessel
functions, mollifier cutoff of 3.7 Å, epsilon 1e-3, a table of ten rows, another width and
activation in the head. Structures: distorted ethanol and acetonitrile, an oxygen atom, and
acetonitrile with an oxygen atom 30 Å away.
"""

import pickle
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from ase import Atoms

from mlip_jax.checkpoint import to_arrays
from mlip_jax.importers import schnetpack
from mlip_jax.importers.formats.weights import WeightsError, read
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.calculator import MLIPCalculator

DATA = Path(__file__).parents[1] / "data"
OPTIONS = {
    "schnet": {},
    "painn": {},
    "painn_shared": {"epsilon": 1e-3, "energy_act": "shifted_softplus"},
}


def golden(kind):
    """Return the state dict, and the structures as (atoms, energy, forces)."""
    with np.load(DATA / f"parity_schnetpack_{kind}.npz") as data:
        state = {
            name.removeprefix("weights/"): data[name]
            for name in data.files
            if name.startswith("weights/")
        }
        structures = [
            (
                Atoms(data[f"structures/{n}/numbers"], data[f"structures/{n}/positions"]),
                float(data[f"structures/{n}/energy"]),
                data[f"structures/{n}/forces"],
            )
            for n in range(4)
        ]
    return state, structures


def save(path, state):
    """Save the state dict in the format of the suffix."""
    if path.suffix == ".npz":
        np.savez(path, **state)
    else:
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(array) for name, array in state.items()}, path
        )
    return path


def assert_agrees(calc, structures, relative):
    largest = max(np.abs(forces).max() for _, _, forces in structures)
    assert largest > 0.1
    for atoms, energy, forces in structures:
        atoms = atoms.copy()
        atoms.calc = calc
        assert atoms.get_potential_energy() == pytest.approx(energy, rel=relative)
        np.testing.assert_allclose(atoms.get_forces(), forces, rtol=0, atol=relative * largest)


@pytest.mark.parametrize(
    ("kind", "dtype", "relative"),
    [
        *((kind, "float64", 1e-11) for kind in OPTIONS),
        ("schnet", "float32", 1e-5),
        # seconds of compilation each
        pytest.param("painn", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("painn_shared", "float32", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_schnetpack(tmp_path, kind, dtype, relative):
    state, structures = golden(kind)
    suffix = ".npz" if dtype == "float64" else ".safetensors"
    path = save(tmp_path / f"weights{suffix}", state)
    calc = MLIPCalculator.from_schnetpack(path, dtype=dtype, **OPTIONS[kind])
    assert_agrees(calc, structures, relative)


def test_both_formats_contain_the_same_weights(tmp_path):
    state, _ = golden("painn")
    npz, other = (
        schnetpack.load(save(tmp_path / f"w{suffix}", state)) for suffix in (".npz", ".safetensors")
    )
    assert npz.model == other.model and npz.elements == other.elements
    jax.tree.map(np.testing.assert_array_equal, npz.params, other.params)


def test_a_shared_parameter_that_is_stored_once_is_found(tmp_path):
    """As safetensors.torch.save_model stores it: the other names are in the metadata."""
    state, _ = golden("painn_shared")
    shared = {name: re.sub(r"(interactions|mixing)\.\d", r"\1.0", name) for name in state}
    once = {name: state[name] for name in set(shared.values())}
    assert len(once) < len(state)
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(
        once, path, {name: kept for name, kept in shared.items() if name != kept}
    )
    potential = read(path)
    assert potential.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(potential[name], state[name])


def test_names_of_a_lightning_task_are_understood(tmp_path):
    state, _ = golden("schnet")
    plain = schnetpack.convert(state)
    prefixed = schnetpack.convert({f"model.{name}": array for name, array in state.items()})
    assert plain.options == prefixed.options
    jax.tree.map(np.testing.assert_array_equal, plain.params, prefixed.params)


def test_options_are_inferred_from_the_state_dict():
    options = schnetpack.convert(golden("schnet")[0]).options
    stored = golden("schnet")[0]["representation.radial_basis.offsets"]
    assert options["radial_centers"] == tuple(float(c) for c in stored)
    assert {
        name: options[name]
        for name in ("num_features", "num_filters", "num_layers", "num_radial", "energy_width")
    } == {"num_features": 12, "num_filters": 8, "num_layers": 2, "num_radial": 7, "energy_width": 6}
    assert options["cutoff"] == float(np.float32(4.2)) and options["cutoff_fn"] == "cosine"
    assert schnetpack.convert(golden("painn_shared")[0]).options["cutoff_fn"] == "exponential"


def test_reference_energies_are_the_mean_and_the_atomic_references(tmp_path):
    state, _ = golden("schnet")
    path = save(tmp_path / "w.npz", state)
    potential = schnetpack.load(path, elements=["H", 8], energy_unit=2.0)
    assert potential.elements == (1, 8) and potential.energy_scale == 2.0
    mean, atomref = state["postprocessors.1.mean"], state["postprocessors.1.atomref"]
    assert potential.reference_energies[8] == 2.0 * (float(mean[0]) + float(atomref[8]))
    assert potential.reference_energies[6] == 0.0
    assert not schnetpack.load(path, do_postprocessing=False).reference_energies.any()
    assert schnetpack.load(path).elements == tuple(range(1, 100))
    with pytest.raises(ValueError, match="not trained on C"):
        MLIPCalculator(potential).get_potential_energy(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]))


def test_energies_are_converted(tmp_path):
    state, structures = golden("schnet")
    calc = MLIPCalculator.from_schnetpack(
        save(tmp_path / "w.npz", state), dtype="float64", energy_unit=0.5
    )
    assert_agrees(
        calc,
        [(atoms, 0.5 * energy, 0.5 * forces) for atoms, energy, forces in structures[:1]],
        1e-11,
    )


def test_an_imported_force_field_survives_a_checkpoint(tmp_path):
    state, _ = golden("painn_shared")
    potential = schnetpack.load(save(tmp_path / "w.npz", state), **OPTIONS["painn_shared"])
    again = Potential.from_checkpoint(to_arrays({"params": potential.params}), potential.metadata)
    assert again.model == potential.model and again.elements == potential.elements == tuple(
        range(1, 10)
    )
    np.testing.assert_array_equal(again.reference_energies, potential.reference_energies)
    jax.tree.map(np.testing.assert_array_equal, again.params, potential.params)


@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".ckpt", ""])
def test_pickles_are_rejected_unread(tmp_path, suffix):
    """The file would leave a mark if it were unpickled."""
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    path = tmp_path / f"best_model{suffix}"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsError, match="save_file"):
        MLIPCalculator.from_schnetpack(path)
    array = np.empty(1, object)
    array[0] = Evil()
    np.savez(tmp_path / "w.npz", good=np.zeros(2), bad=array)
    with pytest.raises(WeightsError, match="'bad' contains Python objects"):
        MLIPCalculator.from_schnetpack(tmp_path / "w.npz")
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_files_are_reported(tmp_path, suffix):
    path = save(tmp_path / f"weights{suffix}", golden("painn")[0])
    whole = path.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=f"weights{suffix}: invalid"):
            schnetpack.load(path)


def test_a_single_array_is_not_a_weights_file(tmp_path):
    with open(tmp_path / "weights.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(WeightsError, match="weights.npz: invalid"):
        schnetpack.load(tmp_path / "weights.npz")


def test_an_invalid_array_is_reported(tmp_path):
    path = save(tmp_path / "weights.npz", golden("painn")[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="weights.npz: invalid"):
        schnetpack.load(path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        schnetpack.load(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    "name",
    [
        "representation.electronic_embeddings.0.linear_q.weight",
        "output_modules.0.outnet.2.weight",
        "output_modules.1.outnet.0.weight",
        "postprocessors.1.scale",
        "representation.cutoff_fn.switch_on",
        "representation.mixing.2.mu_channel_mix.weight",
        "other.weight",
    ],
)
def test_an_unsupported_weight_is_reported(tmp_path, name):
    state, _ = golden("painn")
    path = save(tmp_path / "w.npz", state | {name: np.ones((2, 2), np.float32)})
    with pytest.raises(WeightsError, match=f"w.npz: .*{re.escape(name)}"):
        schnetpack.load(path)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_missing_or_misshapen_weight_is_reported(kind):
    state, _ = golden(kind)
    for name in state:
        if name.startswith(("postprocessors", "representation.cutoff_fn.eps")):
            continue
        rest = {other: array for other, array in state.items() if other != name}
        with pytest.raises(WeightsError):
            schnetpack.convert(rest)
        with pytest.raises(WeightsError, match=r"weight|expected"):
            schnetpack.convert(state | {name: np.ones((3, *np.shape(state[name])), np.float32)})
    name = "output_modules.0.outnet.0.bias"
    with pytest.raises(WeightsError, match=re.escape(f"'{name}': expected shape (")):
        schnetpack.convert(state | {name: np.ones(99)})
    with pytest.raises(WeightsError, match=f"'{re.escape(name)}' is missing"):
        schnetpack.convert({other: array for other, array in state.items() if other != name})


def test_other_arrays_are_not_a_schnetpack_model():
    with pytest.raises(
        WeightsError, match="representation.embedding.weight.*received 0.*'?stranger"
    ):
        schnetpack.convert({"stranger": np.zeros(3)})
    only = {
        "representation.embedding.weight": np.zeros((10, 4)),
        "representation.cutoff_fn.cutoff": np.full(1, 5.0),
        "representation.radial_basis.offsets": np.zeros(3),
        "representation.radial_basis.widths": np.ones(3),
        "representation.so3convs.0.weight": np.zeros(3),
    }
    with pytest.raises(WeightsError, match="neither.*so3convs"):
        schnetpack.convert(only)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "PaiNN's activation must be silu"),
        ({"energy_act": "silo"}, "Did you mean 'silu'"),
        ({"elements": [1, 10]}, "from 1 to 9"),
        ({"elements": ["Xx"]}, "Xx"),
        ({"elements": []}, "elements"),
    ],
)
def test_invalid_options_are_reported(tmp_path, options, message):
    path = save(tmp_path / "w.npz", golden("painn_shared")[0])
    with pytest.raises(ValueError, match=message):
        MLIPCalculator.from_schnetpack(path, **options)


def test_a_reference_energy_that_is_not_finite_is_reported(tmp_path):
    state, _ = golden("schnet")
    atomref = state["postprocessors.1.atomref"].copy()
    atomref[3] = np.nan
    path = save(tmp_path / "w.npz", state | {"postprocessors.1.atomref": atomref})
    with pytest.raises(ValueError, match=r"elements \[3\] are not finite"):
        schnetpack.load(path)
    assert schnetpack.load(path, elements=["H", "C"]).elements == (1, 6)
