"""Tests for the import of SO3LR's parameter file, against a plain implementation of the equations.

A small file of the same layout with random weights replaces the file of the release. With the
latter, this importer gives the energies and forces which SO3LR's own tests expect of two molecules
to 3e-7 eV and 4e-7 eV/Å in float64 (its results in JAX-MD; those through ASE, for which positions
were rounded to float32, to 2e-5 eV and 5e-5 eV/Å).
"""

import pickle

import jax
import numpy as np
import pytest
import yaml
from ase import Atoms
from scipy.special import comb, erf

from mlip_jax import MLIPCalculator
from mlip_jax.importers import mlff, so3lr
from mlip_jax.importers.formats.mlff_weights import MlffWeights
from mlip_jax.importers.formats.weights import WeightsError

SMALL = {
    "num_layers": 2,
    "num_features": 8,
    "num_heads": 2,
    "degrees": [1, 2],
    "num_radial_basis_fn": 6,
    "energy_regression_dim": 8,
}
CUTOFF, LONG_RANGE, NEIGHBORS = 4.5, 5.0, 7.5


def random_weights(s, seed=0):
    """Return random weights by their names in SO3LR's file, for the settings `s`."""
    rng = np.random.default_rng(seed)
    f, heads, degrees, hidden = (
        s["num_features"],
        s["num_heads"],
        len(s["degrees"]),
        s["energy_regression_dim"],
    )
    weights = {}

    def array(name, *shape, mean=0.0, scale=None):
        scale = (
            1 / np.sqrt(shape[0] if len(shape) == 2 and shape[0] < 99 else 4)
            if scale is None
            else scale
        )
        weights[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def dense(name, *shape, bias=True):
        array(f"{name}/kernel", *shape)
        if bias:
            array(f"{name}/bias", shape[1])

    array("feature_embeddings_0/Embed_0/embedding", 119, f)
    for k in (1, 2):
        name = f"feature_embeddings_{k}/ChargeSpinEmbedSparse_0"
        for n, rows in enumerate((119, 2, 2)):
            array(f"{name}/Embed_{n}/embedding", rows, f)
        for n in (0, 1):
            dense(f"{name}/Residual_0/layers_{n}", f, f, bias=False)
    for n in range(s["num_layers"]):
        block = f"layers_{n}/attention_block"
        for mark, parts in (("1", heads), ("2", degrees)):
            for kind in ("q", "k") + (("v",) if mark == "1" else ()):
                array(f"{block}/W{kind}{mark}", parts, f // parts, f // parts)
            dense(f"{block}/radial_filter{mark}_layer_1", s["num_radial_basis_fn"], f)
            dense(f"{block}/radial_filter{mark}_layer_2", f, f)
            dense(f"{block}/spherical_filter{mark}_layer_1", degrees, f // 4)
            dense(f"{block}/spherical_filter{mark}_layer_2", f // 4, f)
        dense(f"layers_{n}/exchange_block/mlp_layer_2", f + degrees, f + degrees)
        for k in (1, 2):
            array(f"layers_{n}/layer_normalization_{k}/scale", f, mean=1.0, scale=0.1)
            array(f"layers_{n}/layer_normalization_{k}/bias", f)
            dense(f"layers_{n}/res_mlp_1_layer_{k}", f, f)
    head = "observables_0"
    dense(f"{head}/energy_dense_regression", f, hidden)
    dense(f"{head}/energy_dense_final", hidden, 1)
    array(f"{head}/atomic_scales", 119, mean=1.0)
    array(f"{head}/energy_offset", 119)
    for name, value in {
        "a1": 3.2,
        "a2": 0.94,
        "a3": 0.4,
        "a4": 0.2,
        "c1": 0.18,
        "c2": 0.51,
        "c3": 0.28,
        "c4": 0.03,
        "p": 0.23,
        "d": 2.1,
    }.items():
        array(f"{head}/zbl_repulsion/{name}", 1, mean=np.log(np.expm1(value)), scale=0.1)
    name = f"{head}/electrostatic_energy/partial_charges"
    array(f"{name}/Embed_0/embedding", 100, 1)
    dense(f"{name}/charge_dense_regression_vec", f, hidden)
    dense(f"{name}/charge_dense_final_vec", hidden, 1)
    array("observables_2/Embed_0/embedding", 100, 1, mean=0.9, scale=0.1)
    array("observables_2/Embed_1/embedding", 100, f // 2)
    dense("observables_2/hirshfeld_ratios_dense_regression", f, hidden // 2)
    dense("observables_2/hirshfeld_ratios_dense_final", hidden // 2, f // 2)
    return weights


def nested(weights):
    tree = {}
    for name, value in weights.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


@pytest.fixture(scope="module")
def weights():
    return random_weights(SMALL)


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """Files (params.pkl, hyperparameters.yaml)."""
    folder = tmp_path_factory.mktemp("so3lr")
    (folder / "params.pkl").write_bytes(pickle.dumps({"params": nested(weights)}))
    model = dict(so3lr.HYPERPARAMETERS) | SMALL
    del model["avg_num_neighbors"]
    data = {"avg_num_neighbors": NEIGHBORS, "energy_unit": "eV", "length_unit": "Angstrom"}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    return folder / "params.pkl", folder / "hyperparameters.yaml"


# --- The equations, atom by atom and pair by pair; positions may be complex ---

ALPHA = {1: 4.5, 6: 12.0, 7: 7.4, 8: 5.4, 16: 19.6}
C6 = {1: 6.5, 6: 46.6, 7: 24.2, 8: 15.6, 16: 134.0}


def silu(x):
    return x / (1 + np.exp(-x))


class Plain:
    """Energy, charges and ratios of one structure."""

    def __init__(self, weights, numbers, charge, spin):
        self.w = {name: value.astype(float) for name, value in weights.items()}
        self.numbers, self.charge, self.spin = numbers, charge, spin

    def dense(self, name, x):
        return x @ self.w[f"{name}/kernel"] + self.w.get(f"{name}/bias", 0.0)

    def head(self, name, first, last, x):
        return self.dense(f"{name}/{last}", silu(self.dense(f"{name}/{first}", x)))

    def state(self, k, psi):
        name, row = f"feature_embeddings_{k}/ChargeSpinEmbedSparse_0", 0 if psi >= 0 else 1
        q, key, v = (self.w[f"{name}/Embed_{n}/embedding"] for n in range(3))
        y = np.log1p(np.exp(q[self.numbers] @ key[row] / np.sqrt(q.shape[1])))
        x = (psi * y / y.sum())[:, None] * v[row]
        return (
            x
            + silu(silu(x) @ self.w[f"{name}/Residual_0/layers_0/kernel"])
            @ self.w[f"{name}/Residual_0/layers_1/kernel"]
        )

    def layer_norm(self, name, f):
        f = f - f.mean(-1, keepdims=True)
        f = f / np.sqrt((f * f).mean(-1, keepdims=True) + 1e-6)
        return f * self.w[f"{name}/scale"] + self.w[f"{name}/bias"]

    def layer(self, n, f, x, geometry):
        block, new_f, new_x = f"layers_{n}/attention_block", f.copy(), x.copy()

        def per_head(name, v):
            kernel = self.w[f"{block}/{name}"]
            parts = v.reshape(len(kernel), -1)
            return np.stack([kernel[h] @ parts[h] for h in range(len(kernel))])

        for (i, j), (rbf, cut, harmonics) in geometry.items():
            filters = [
                self.head(block, f"radial_filter{m}_layer_1", f"radial_filter{m}_layer_2", rbf)
                + self.head(
                    block,
                    f"spherical_filter{m}_layer_1",
                    f"spherical_filter{m}_layer_2",
                    invariants(x[j] - x[i]),
                )
                for m in (1, 2)
            ]
            attention = []
            for m, w in zip((1, 2), filters):
                q, k = per_head(f"Wq{m}", f[i]), per_head(f"Wk{m}", f[j])
                attention.append(cut * (q * w.reshape(q.shape) * k).sum(1) / NEIGHBORS)
            new_f[i] += (attention[0][:, None] * per_head("Wv1", f[j])).ravel()
            new_x[i] += np.repeat(attention[1], [3, 5]) * harmonics
        f = self.layer_norm(f"layers_{n}/layer_normalization_1", new_f)
        f = f + self.dense(
            f"layers_{n}/res_mlp_1_layer_2",
            silu(self.dense(f"layers_{n}/res_mlp_1_layer_1", silu(f))),
        )
        mixed = self.dense(
            f"layers_{n}/exchange_block/mlp_layer_2",
            np.concatenate([f, np.stack([invariants(v) for v in new_x])], axis=1),
        )
        width = f.shape[1]
        x = new_x + np.repeat(mixed[:, width:], [3, 5], axis=1) * new_x
        return self.layer_norm(f"layers_{n}/layer_normalization_2", f + mixed[:, :width]), x

    def features(self, positions):
        f = self.w["feature_embeddings_0/Embed_0/embedding"][self.numbers]
        f = (f + self.state(1, self.charge) + self.state(2, self.spin)) / np.sqrt(3)
        f, x, geometry, n = (
            f.astype(positions.dtype),
            np.zeros((len(f), 8), positions.dtype),
            {},
            len(positions),
        )
        for i in range(n):
            for j in range(n):
                r = positions[j] - positions[i]
                d = np.sqrt((r * r).sum())
                if i != j and d.real < CUTOFF:
                    k, y, u = np.arange(6), np.exp(-0.9448630629 * d), d / CUTOFF
                    geometry[i, j] = (
                        comb(5, k) * y**k * (1 - y) ** (5 - k),
                        1 - 6 * u**5 + 15 * u**4 - 10 * u**3,
                        harmonics(r / d),
                    )
        for layer in range(2):
            f, x = self.layer(layer, f, x, geometry)
        return f

    def charges(self, f):
        name = "observables_0/electrostatic_energy/partial_charges"
        q = self.head(name, "charge_dense_regression_vec", "charge_dense_final_vec", f)[:, 0]
        q = q + self.w[f"{name}/Embed_0/embedding"][self.numbers, 0]
        return q + (self.charge - q.sum()) / len(q)

    def ratios(self, f):
        k = self.head(
            "observables_2", "hirshfeld_ratios_dense_regression", "hirshfeld_ratios_dense_final", f
        )
        h = self.w["observables_2/Embed_0/embedding"][self.numbers, 0] + (
            self.w["observables_2/Embed_1/embedding"][self.numbers] * k
        ).sum(1) / np.sqrt(k.shape[1])
        return np.where(h.real > 0, h, -h)

    def energy(self, positions):
        f, z = self.features(positions), self.numbers
        atomic = self.head("observables_0", "energy_dense_regression", "energy_dense_final", f)[
            :, 0
        ]
        total = (
            atomic * self.w["observables_0/atomic_scales"][z]
            + self.w["observables_0/energy_offset"][z]
        ).sum()
        q, h = self.charges(f), self.ratios(f)
        for i in range(len(z)):
            for j in range(i):
                d = np.sqrt(((positions[j] - positions[i]) ** 2).sum())
                total = total + self.zbl(z[i], z[j], d)
                if d.real < LONG_RANGE:
                    total = total + coulomb(q[i], q[j], d) + dispersion(z[i], z[j], h[i], h[j], d)
        return total

    def zbl(self, zi, zj, d):
        if d.real >= 1.5:
            return 0.0
        p = {
            name: np.log1p(np.exp(self.w[f"observables_0/zbl_repulsion/{name}"][0]))
            for name in ("a1", "a2", "a3", "a4", "c1", "c2", "c3", "c4", "p", "d")
        }
        x, c = d * (zi ** p["p"] + zj ** p["p"]) * p["d"], [p[f"c{k}"] for k in range(1, 5)]
        phi = sum(c[k - 1] * np.exp(-p[f"a{k}"] * x) for k in range(1, 5)) / sum(c)
        u = d / CUTOFF
        return (
            14.399645351950548
            * zi
            * zj
            / d
            * phi
            * (1 - 6 * u**5 + 15 * u**4 - 10 * u**3)
            * switch(d, 0, 1.5)
        )


def invariants(x):
    return np.array([(x[:3] ** 2).sum() / np.sqrt(3), (x[3:] ** 2).sum() / np.sqrt(5)])


def harmonics(u):
    x, y, z = u
    first = np.sqrt(3 / (4 * np.pi)) * np.array([x, y, z])
    second = np.sqrt(15 / (4 * np.pi)) * np.array(
        [x * y, y * z, z * x, (x * x - y * y) / 2, (2 * z * z - x * x - y * y) / np.sqrt(12)]
    )
    return np.concatenate([first, second])


def switch(d, start, end):
    c = (d - start) / (end - start)
    if c.real <= 0 or c.real >= 1:
        return 1.0 if c.real <= 0 else 0.0
    return np.exp(-1 / (1 - c)) / (np.exp(-1 / (1 - c)) + np.exp(-1 / c))


def coulomb(qi, qj, d):
    v, at = erf(d / 4) / d, erf(LONG_RANGE / 4) / LONG_RANGE
    slope = (
        2 / np.sqrt(np.pi) * np.exp(-((LONG_RANGE / 4) ** 2)) / (4 * LONG_RANGE) - at / LONG_RANGE
    )
    s = switch(d, 0.45 * LONG_RANGE, LONG_RANGE)
    return (
        14.399645351950548
        * qi
        * qj
        * (s * (v - at) + (1 - s) * (v - at - slope * (d - LONG_RANGE)))
    )


def dispersion(zi, zj, hi, hj, d):
    ai, aj, ci, cj = ALPHA[zi] * hi, ALPHA[zj] * hj, C6[zi] * hi**2, C6[zj] * hj**2
    c6, alpha = 2 * ci * cj * ai * aj / (ai**2 * cj + aj**2 * ci), (ai + aj) / 2
    radius = 137.0359991 ** (4 / 21) * alpha ** (1 / 7)
    gamma = (
        0.5
        / (-0.00433008 + 0.24428889 * radius + 0.04125273 * radius**2 - 0.00078893 * radius**3) ** 2
    )
    r, p = d / 0.5291772105638411, 1.2 * 2 * 2.54 * alpha ** (1 / 7)
    series = (
        c6 / (r**6 + p**6)
        + 5 * c6 / gamma / (r**8 + p**8)
        + 245 * c6 / (8 * gamma**2) / (r**10 + p**10)
    )
    return -27.211386024367243 * series * switch(d, LONG_RANGE - 2, LONG_RANGE)


# --- Tests ---

MOLECULE = Atoms(
    [6, 1, 8, 7, 1, 16, 1],
    [
        [0.0, 0.1, 0.0],
        [0.9, 0.5, -0.4],
        [-0.6, -1.0, 0.5],
        [0.2, 1.2, 0.7],
        [-1.9, 1.5, 0.2],
        [1.1, -0.6, 1.9],
        [3.1, 2.9, 2.2],
    ],
)


TOLERANCES = {"float64": 1e-8, "float32": 1e-4}  # relative


@pytest.fixture(scope="module", params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def calculator(files, request):
    """Calculator of each precision.

    float32 is slow: tests/models/test_contract.py compares So3krates and tests/terms the terms in
    both precisions.
    """
    path, settings = files
    return MLIPCalculator(so3lr.load(path, LONG_RANGE, settings), request.param)


@pytest.mark.filterwarnings("ignore:.*unpaired")
@pytest.mark.parametrize(("charge", "spin"), [(0, 0), (2, 1), (-1, 2)])
def test_agrees_with_the_equations(weights, calculator, charge, spin):
    tolerance = TOLERANCES[calculator.dtype.name]
    atoms = MOLECULE.copy()
    atoms.info = {"charge": charge, "num_unpaired_electrons": spin}
    plain = Plain(weights, atoms.numbers, charge, spin)
    expected, derivatives = plain.energy(atoms.positions), np.zeros_like(atoms.positions)
    for n, axis in np.ndindex(derivatives.shape):
        step = atoms.positions.astype(complex)
        step[n, axis] += 1e-30j  # a complex step: exact to rounding
        derivatives[n, axis] = plain.energy(step).imag / 1e-30
    atoms.calc = calculator
    assert atoms.get_potential_energy() == pytest.approx(expected, rel=tolerance)
    np.testing.assert_allclose(
        atoms.get_forces(), -derivatives, atol=tolerance * np.abs(derivatives).max()
    )
    features = plain.features(atoms.positions)
    np.testing.assert_allclose(atoms.get_charges(), plain.charges(features), atol=tolerance)
    np.testing.assert_allclose(
        calculator.predictions["hirshfeld_ratios"], plain.ratios(features), atol=tolerance
    )
    assert atoms.get_charges().sum() == pytest.approx(charge, abs=tolerance)


def test_the_layout_of_the_release(tmp_path):
    """Names and shapes of SO3LR's own file, and the metadata of the force field."""
    weights = random_weights(so3lr.HYPERPARAMETERS)
    (tmp_path / "params.pkl").write_bytes(pickle.dumps({"params": nested(weights)}))
    potential = so3lr.load(tmp_path / "params.pkl")
    filled_up = 19 * (1 + 1 + 64)  # rows of elements 100 to 118
    assert (
        sum(p.size for p in jax.tree.leaves(potential.params))
        == sum(w.size for w in weights.values()) + filled_up
    )
    assert (
        potential.cutoff == 4.5
        and potential.long_range_cutoff == 12.0
        and potential.energy_scale == 1.0
    )
    assert (
        potential.elements == (1, 6, 7, 8, 9, 15, 16, 17) and not potential.reference_energies.any()
    )
    assert so3lr.load(tmp_path / "params.pkl", long_range_cutoff=None).long_range_cutoff == np.inf
    np.savez(tmp_path / "params.npz", **weights)
    again = so3lr.load(tmp_path / "params.npz")
    jax.tree.map(np.testing.assert_array_equal, again.params, potential.params)


def test_elements_without_training_data_are_rejected(files):
    path, settings = files
    calculator = MLIPCalculator(so3lr.load(path, hyperparameters=settings))
    with pytest.raises(ValueError, match="not trained on Si"):
        Atoms("Si", calculator=calculator).get_potential_energy()


def test_missing_file_gives_the_download_location(tmp_path):
    with pytest.raises(FileNotFoundError, match="params.pkl of the SO3LR release"):
        MLIPCalculator.from_so3lr(tmp_path / "params.pkl")


def test_a_pickle_of_more_than_arrays_is_not_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (tmp_path.joinpath("run").touch, ())

    (tmp_path / "params.pkl").write_bytes(pickle.dumps({"params": {"a": Malicious()}}))
    with pytest.raises(ValueError, match="not executed"):
        so3lr.load(tmp_path / "params.pkl")
    assert not (tmp_path / "run").exists()


def test_other_weights_are_rejected(weights, files, tmp_path):
    _, settings = files

    def load(changed):
        (tmp_path / "params.pkl").write_bytes(pickle.dumps(changed))
        return so3lr.load(tmp_path / "params.pkl", hyperparameters=settings)

    with pytest.raises(WeightsError, match="entry 'params'"):
        load([1, 2])
    with pytest.raises(WeightsError, match="do not contain 'observables_0/atomic_scales'"):
        load(
            {
                "params": nested(
                    {k: v for k, v in weights.items() if k != "observables_0/atomic_scales"}
                )
            }
        )
    with pytest.raises(WeightsError, match="1 weights are not part of .* observables_3/extra"):
        load({"params": nested({**weights, "observables_3/extra": np.zeros(3, np.float32)})})
    with pytest.raises(WeightsError, match="'keys'.*shape .3, 8., expected .2, 8."):
        load(
            {
                "params": nested(
                    {
                        **weights,
                        "feature_embeddings_1/ChargeSpinEmbedSparse_0/Embed_1/embedding": np.zeros(
                            (3, 8), np.float32
                        ),
                    }
                )
            }
        )
    with pytest.raises(WeightsError, match="layers_0 must be an array"):
        load({"params": {"layers_0": "text"}})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("feature_embeddings_0/Embed_0/embedding", (952,)),
        ("feature_embeddings_0/Embed_0/embedding", (120, 8)),
        ("observables_0/atomic_scales", ()),
        ("observables_2/Embed_0/embedding", (100,)),
        ("observables_2/Embed_0/embedding", (100, 2)),
        ("observables_0/zbl_repulsion/p", (2,)),
        ("observables_0/zbl_repulsion/a1", ()),
    ],
)
def test_weights_of_another_shape_are_rejected(weights, files, name, shape):
    changed = {**weights, name: np.ones(shape, np.float32)}
    with pytest.raises(WeightsError, match=f"weight {name} has shape"):
        settings = mlff.read_hyperparameters(files[1])
        mlff.potential(changed, settings, so3lr.ELEMENTS, long_range_cutoff=LONG_RANGE)


def test_recursive_dicts_are_rejected():
    for leaf in ({"kernel": np.ones(1, np.float32)}, {}):
        tree = leaf
        for _ in range(10):
            tree = {str(n): tree for n in range(20)}
        with pytest.raises(WeightsError, match="more than 100000 weights"):
            MlffWeights(tree)


def test_unsupported_hyperparameters_are_rejected(files, tmp_path):
    _, settings = files
    hyperparameters = mlff.read_hyperparameters(settings)
    with pytest.raises(WeightsError, match="activation_fn must be 'silu', received 'tanh'"):
        mlff.model_options({**mlff.model_settings(hyperparameters), "activation_fn": "tanh"})
    with pytest.raises(WeightsError, match="energy_unit is 'kcal/mol'"):
        mlff.model_settings({**hyperparameters, "data": {"energy_unit": "kcal/mol"}})
    with pytest.raises(WeightsError, match="missing: num_heads"):
        mlff.model_options({k: v for k, v in hyperparameters["model"].items() if k != "num_heads"})
    for name, value in (
        ("num_features", "8"),
        ("num_layers", 0),
        ("num_heads", None),
        ("degrees", 2),
        ("degrees", []),
        ("degrees", [1, "2"]),
        ("cutoff", [4.5]),
        ("cutoff", float("nan")),
        ("cutoff_fn", None),
        ("energy_regression_dim", None),
        ("energy_regression_dim", -1),
    ):
        with pytest.raises(WeightsError, match=f"hyperparameter {name} must be .*received"):
            mlff.potential(
                {}, {**mlff.model_settings(hyperparameters), name: value}, so3lr.ELEMENTS
            )
    for data in ({}, {"avg_num_neighbors": None}):
        with pytest.raises(WeightsError, match="avg_num_neighbors .*is missing"):
            mlff.model_options(mlff.model_settings({**hyperparameters, "data": data}))
    with pytest.raises(WeightsError, match="data must be a table, received None"):
        mlff.model_settings({**hyperparameters, "data": None})
    (tmp_path / "wrong.yaml").write_text("just text")
    with pytest.raises(WeightsError, match="entry 'model'"):
        mlff.read_hyperparameters(tmp_path / "wrong.yaml")
