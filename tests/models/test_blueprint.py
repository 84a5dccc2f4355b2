"""A model as a dictionary of parameters and the rest."""

import jax
import numpy as np
from flax import nnx

from effattn_jax.models.blueprint import blueprint, parameters_of
from tests.layers.catalogue import jit
from tests.models.tiny import DIM, MLP, REPEATS, VOCAB, hybrid, make

TOKENS = np.arange(6)[None]


def test_round_trip():
    """The same parameters under the same names, and a model that computes the same, also when built inside a trace."""
    model, plan = hybrid(tie_embeddings=False), blueprint(lambda: make(tie_embeddings=False))
    parameters = parameters_of(model)
    assert parameters.keys() == set(plan.names) == plan.shapes.keys() == plan.axes.keys()
    assert {name: (x.shape, x.dtype) for name, x in parameters.items()} == {
        name: (x.shape, x.dtype) for name, x in plan.shapes.items()
    }
    again = plan.model(parameters)
    for name, x in parameters_of(again).items():
        assert x is parameters[name], name
    assert nnx.graphdef(again) == nnx.graphdef(model)
    run = jit(lambda parameters: plan.model(parameters)(TOKENS)[0])
    np.testing.assert_array_equal(run(parameters), jit(lambda model: model(TOKENS)[0])(model))
    run(dict(reversed(parameters.items())))  # by name, not by order


def test_names_shapes_and_axes():
    plan = blueprint(lambda: make(tie_embeddings=False))
    expected = {
        "embedding": ((VOCAB, DIM), ("vocab", "embed")),
        "head.kernel": ((DIM, VOCAB), ("embed", "vocab")),
        "final_norm.scale": ((DIM,), ("embed",)),
        "units.blocks.0.mixer.A_log": ((REPEATS, 4), (None, "heads")),
        "units.blocks.0.mixer.x_conv.taps": ((REPEATS, 4, 2 * DIM), (None, "conv", "heads")),
        "units.blocks.1.mixer.sinks": ((REPEATS, 2), (None, "heads")),
        "units.blocks.2.mixer.q_norm.scale": ((REPEATS, 6), (None, "head")),
        "units.blocks.2.mlp.down.kernel": ((REPEATS, MLP, DIM), (None, "mlp", "embed")),
    }
    for name, (shape, axes) in expected.items():
        assert (plan.shapes[name].shape, plan.axes[name]) == (shape, axes)
    for name, shape in plan.shapes.items():
        assert len(plan.axes[name]) == shape.ndim, name


def test_nothing_is_computed():
    """A model of a trillion parameters has a blueprint."""
    plan = blueprint(lambda: make(dim=2**14, mlp_dim=2**22, repeats=4))
    assert sum(np.prod(x.shape) for x in plan.shapes.values()) > 1e12
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in plan.shapes.values())
