"""Tests for agreement with TorchMD-Net 3.1.0, and for rejected input.

The fixture tests/data/parity_torchmdnet_et.npz was made by running TorchMD-Net 3.1.0 with precision
64. It contains small models with random weights (in single precision, which keeps them short), and
energies and forces of four structures: a molecule; one with distant groups of atoms and an isolated
atom; a linear one; a triclinic cell. "weights" is the concatenated state dict, "names" are its
names and shapes, "hparams" the arguments of create_model.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.importers import torchmdnet
from mlip_jax.potential import evaluate
from mlip_jax.structure import Structure

DATA = Path(__file__).parents[1] / "data" / "parity_torchmdnet_et.npz"
VARIANTS = ("published", "smooth", "values", "plain", "trained_basis")
ELEMENTS = ("H", "C", "N", "O", "F", "Si", "S", "Cl")


pytestmark = pytest.mark.usefixtures("double_precision")


@functools.cache
def fixture():
    with np.load(DATA, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def state_and_hparams(variant):
    data, state, start = fixture(), {}, 0
    for name, shape in json.loads(str(data[f"{variant}/names"])).items():
        size = int(np.prod(shape))
        state[name] = data[f"{variant}/weights"][start : start + size].reshape(shape)
        start += size
    return state, json.loads(str(data[f"{variant}/hparams"]))


def structures():
    data = fixture()
    for n in range(4):
        cell = data.get(f"structures/{n}/cell")
        yield Structure(
            data[f"structures/{n}/numbers"],
            data[f"structures/{n}/positions"],
            cell=cell,
            pbc=None if cell is None else np.ones(3, bool),
        )


def energies_and_forces(potential, undirected=True, dtype=np.float64, with_forces=True):
    """Return total energies (4,) and forces of all structures in one padded batch."""
    found, model = list(structures()), potential.model.clone(undirected=undirected)
    columns = Columns.from_structures(found)
    sizes = graph_sizes(columns, model.cutoff)
    budget = PaddingBudget(int(sizes.n_node.sum()) + 3, int(sizes.n_edge.sum()) + 6, len(found) + 2)
    batch = build_batch(columns, budget, model.cutoff, dtype=dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), potential.params)
    result = jax.jit(
        lambda p, g: evaluate(model, p, g, potential.energy_scale, with_forces=with_forces)
    )(params, batch)
    references = np.array([potential.reference_energies[s.numbers].sum() for s in found])
    return np.asarray(result.energy)[: len(found)] + references, np.asarray(result.forces)[
        : len(columns.numbers)
    ]


def assert_energies_agree(variant, energies, relative):
    expected = fixture()[f"{variant}/energies"]
    np.testing.assert_allclose(energies, expected, rtol=0, atol=relative * np.abs(expected).max())


def assert_agree(variant, energies, forces, relative):
    assert_energies_agree(variant, energies, relative)
    expected = fixture()[f"{variant}/forces"]
    np.testing.assert_allclose(forces, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_energies_agree(variant):
    """Catches wrong weights and equations, without the compilation of forces."""
    potential = torchmdnet.potential(*state_and_hparams(variant), elements=ELEMENTS)
    energies, _ = energies_and_forces(potential, with_forces=False)
    assert_energies_agree(variant, energies, 1e-9)


@pytest.mark.parametrize(
    "variant", [v if v == "smooth" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_agrees_with_torchmdnet(variant):
    potential = torchmdnet.potential(*state_and_hparams(variant), elements=ELEMENTS)
    assert_agree(variant, *energies_and_forces(potential), 1e-9)


def test_agrees_on_a_directed_list():
    potential = torchmdnet.potential(*state_and_hparams("values"), elements=ELEMENTS)
    energies, _ = energies_and_forces(potential, undirected=False, with_forces=False)
    assert_energies_agree("values", energies, 1e-9)


@pytest.mark.slow
def test_agrees_in_single_precision():
    potential = torchmdnet.potential(*state_and_hparams("published"), elements=ELEMENTS)
    with jax.enable_x64(False):
        energies, forces = energies_and_forces(potential, dtype=np.float32)
    assert forces.dtype == np.float32
    assert_agree("published", energies, forces, 1e-5)


def test_the_variants_differ_in_their_options():
    options = [
        torchmdnet.potential(*state_and_hparams(variant), elements=ELEMENTS).model
        for variant in VARIANTS
    ]
    assert {m.distance_influence for m in options} == {"both", "keys", "values", "none"}
    assert {m.radial_basis for m in options} == {"expnorm", "gaussian"}
    for field in ("vector_cutoff", "neighbor_embedding", "trainable_rbf"):
        assert {getattr(m, field) for m in options} == {True, False}
    assert (
        len({m.activation for m in options}) == 4 and len({m.attn_activation for m in options}) == 4
    )


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_file_next_to_hparams(tmp_path, form):
    state, hparams = state_and_hparams("published")
    path = tmp_path / f"weights.{form}"
    saved = {
        f"model.{name}": array for name, array in state.items()
    }  # with the names of a training run
    np.savez(path, **saved) if form == "npz" else safetensors.numpy.save_file(saved, path)
    (tmp_path / "hparams.yaml").write_text(
        yaml.safe_dump(hparams | {"batch_size": 8, "load_model": None})
    )
    potential = torchmdnet.load(path, energy_unit=2.0)
    atomref = state["prior_model.0.atomref.weight"][:, 0].astype(np.float64)
    assert potential.elements == tuple(np.flatnonzero(atomref).tolist())
    np.testing.assert_array_equal(potential.reference_energies[: len(atomref)], 2.0 * atomref)
    assert potential.energy_scale == 2.0 * float(np.float32(1.7))
    assert potential.cutoff == potential.model.cutoff == 3.0
    direct = torchmdnet.potential(state, hparams, ELEMENTS)
    assert potential.model == direct.model
    jax.tree.map(np.testing.assert_array_equal, potential.params, direct.params)


def test_atomref_that_is_switched_off():
    state, hparams = state_and_hparams("published")
    off = hparams | {"prior_model": ["Atomref"], "prior_args": [{"max_z": 18, "enable": False}]}
    assert not torchmdnet.potential(state, off, ELEMENTS).reference_energies.any()


def test_names_of_older_versions():
    state, hparams = state_and_hparams("smooth")
    older = {
        name.replace("update_net.layers.", "update_net."): array
        for name, array in state.items()
        if name != "representation_model.distance.box"
    }
    assert set(older) != set(state)
    old, new = (torchmdnet.potential(s, hparams, ELEMENTS).params for s in (older, state))
    jax.tree.map(np.testing.assert_array_equal, old, new)


WRONG = {
    "another model": ({"model": "tensornet"}, "tensornet"),
    "another output": ({"output_model": "DipoleMoment"}, "DipoleMoment"),
    "mean over atoms": ({"reduce_op": "mean"}, "reduce_op.*'mean'"),
    "fixed box": ({"box_vecs": [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]}, "box_vecs"),
    "activation": ({"activation": "gelu"}, "gelu"),
    "other width": ({"embedding_dimension": 64}, "embedding_dimension is 64.*12"),
    "other depth": ({"num_layers": 6}, "num_layers is 6.*2"),
    "heads": ({"num_heads": 5}, "num_heads=5 .*12"),
    "another prior": ({"prior_model": ["Atomref", "ZBL"]}, "unsupported prior_model 'ZBL'"),
    "no prior": ({"prior_model": None}, "list 0 priors.*contain 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_hparams_that_do_not_match_are_rejected(case):
    state, hparams = state_and_hparams("published")
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        torchmdnet.potential(state, hparams | change, ELEMENTS)


def test_missing_hparams_are_reported(tmp_path):
    state, hparams = state_and_hparams("published")
    del hparams["num_heads"], hparams["cutoff_upper"]
    with pytest.raises(ValueError, match="missing: num_heads, cutoff_upper"):
        torchmdnet.potential(state, hparams, ELEMENTS)
    np.savez(tmp_path / "weights.npz", **state)
    with pytest.raises(ValueError, match="hparams.yaml"):
        torchmdnet.load(tmp_path / "weights.npz")


@pytest.mark.parametrize("text", ["- 1\n", "a: !!python/object:os.system {}\n", "a: [1\n"])
def test_yaml_without_hparams_is_rejected(tmp_path, text):
    (tmp_path / "hparams.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"hparams\.yaml"):
        torchmdnet.read_hparams(tmp_path / "hparams.yaml")


def test_weights_that_do_not_match_are_rejected():
    state, hparams = state_and_hparams("published")
    name = "representation_model.attention_layers.1.q_proj.weight"
    with pytest.raises(ValueError, match="not part of.*extra.weight"):
        torchmdnet.potential(
            state | {"representation_model.extra.weight": np.zeros(2)}, hparams, ELEMENTS
        )
    with pytest.raises(ValueError, match=r"does not contain '.*layers\.1\.q_proj\.weight'"):
        torchmdnet.potential({k: v for k, v in state.items() if k != name}, hparams, ELEMENTS)
    with pytest.raises(
        ValueError, match=r"layers\.1\.q_proj.weight must have shape \(12, 12\).*\(12, 11\)"
    ):
        torchmdnet.potential(state | {name: np.zeros((12, 11), np.float32)}, hparams, ELEMENTS)
    with pytest.raises(ValueError, match=r"embedding.weight must be a table.*\(12,\)"):
        torchmdnet.potential(
            state | {"representation_model.embedding.weight": np.zeros(12)}, hparams, ELEMENTS
        )
    with pytest.raises(ValueError, match="mean of -3"):
        torchmdnet.potential(state | {"mean": np.array(-3.0)}, hparams, ELEMENTS)
    with pytest.raises(ValueError, match="fixed periodic box"):
        torchmdnet.potential(
            state | {"representation_model.distance.box": 9.0 * np.eye(3)}, hparams, ELEMENTS
        )


def test_elements_are_required_if_unknown():
    state, hparams = state_and_hparams("smooth")
    with pytest.raises(ValueError, match="Give elements"):
        torchmdnet.potential(state, hparams)
    with pytest.raises(ValueError, match="from 1 to 17"):
        torchmdnet.potential(state, hparams, ("H", "Fe"))
    assert torchmdnet.potential(state, hparams, ("O", 1)).elements == (1, 8)
