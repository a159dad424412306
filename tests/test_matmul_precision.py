"""Tests for the precision of matrix products, by inspection of the traced programs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlip_jax import models
from mlip_jax.models.layers.readouts import with_heads
from mlip_jax.potential import evaluate, example_graph, hessian_columns
from mlip_jax.predictor import batch_outputs
from mlip_jax.simulation.batch_prediction import evaluate_batch
from mlip_jax.simulation.energies import batch_energies, invariant_features
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.step import Trainer

MODEL = models.create("schnet", num_features=4, num_layers=1, num_radial=4)
PREDICTOR = with_heads(MODEL, {"gap": {"kind": "scalar"}})


def params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), example_graph())
    return jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)


def precisions(function, *args):
    """Return the precisions of all matrix products of a program, and of those inside it."""
    found = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.add(str(equation.params["precision"]))
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


PROGRAMS = {
    "evaluate": (MODEL, lambda p, g: evaluate(MODEL, p, g, 1.0).forces),
    "hessian": (MODEL, lambda p, g: hessian_columns(MODEL, p, g, 1.0, jnp.ones((1, 3, 3)))),
    "features": (MODEL, lambda p, g: invariant_features(MODEL, p, g)),
    "predictor": (PREDICTOR, lambda p, g: batch_outputs(PREDICTOR, p, g)),
    "energies": (MODEL, lambda p, g: batch_energies(MODEL, 1.0, p, g)),
    "predictions": (MODEL, lambda p, g: evaluate_batch(MODEL, 1.0, False, True, p, g)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_energies_are_computed_in_full_precision(name):
    """Detects calculators and relaxations with TF32 while dynamics have full precision."""
    model, function = PROGRAMS[name]
    full = "(Precision.HIGHEST, Precision.HIGHEST)"
    assert precisions(function, params(model), example_graph()) == {full}
    with jax.default_matmul_precision("tensorfloat32"):  # the option is followed
        traced = precisions(function, params(model), example_graph())
    assert traced and full not in traced


def test_only_training_steps_use_the_precision_of_the_device():
    graph = example_graph()
    zeros = np.zeros(2, np.float32)
    graph = graph._replace(
        globals={**graph.globals, "energy": zeros},
        nodes={**graph.nodes, "forces": np.zeros((3, 3), np.float32)},
    )
    objective = ForceField(MODEL, 1.0, lambda step: 0.5, 0.5, {"penalty": "mse"})
    trainer = Trainer(objective, optax.sgd(0.1), 0.9)
    text = trainer.lower(
        trainer.init(params(MODEL)), jax.tree.map(lambda x: x[None, None, None], graph)
    ).as_text()
    assert "DEFAULT" in text and "HIGHEST" not in text
