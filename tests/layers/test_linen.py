"""Layers inside Linen models, through `flax.nnx.bridge.to_linen`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from tests.layers.catalogue import BATCH, DIM, RECORDS, agree, inputs, jit, layer

LENGTH, DEPTH = 6, 3
SOME = pytest.mark.parametrize("name", ["mamba2_groups", "attention_window_sinks"])


def boxed(variable):
    return nn.LogicallyPartitioned(variable.get_value(), variable.get_metadata()["axes"])


def to_linen(name):
    record = RECORDS[name]
    return nnx.bridge.to_linen(record.layer, DIM, **record.options, metadata_fn=boxed)


class Residual(nn.Module):
    mixer: str

    @nn.compact
    def __call__(self, x, state):
        y, state = to_linen(self.mixer)(nn.RMSNorm()(x), state)
        return x + y, state


@SOME
@pytest.mark.quick_cases(1)
def test_the_layer_itself(name):
    """Parameters under Linen's names with Linen's logical axes; the same results; states in and out."""
    linen, x = to_linen(name), inputs(LENGTH)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    names = {path: v.get_metadata()["axes"] for path, v in nnx.to_flat_state(nnx.state(layer(name), nnx.Param))}
    boxes = nnx.traversals.flatten_mapping(shapes)
    assert {path: box.names for path, box in boxes.items()} == names

    parameters = nnx.to_pure_dict(nnx.state(layer(name), nnx.Param))
    agree(jit(layer(name))(x)[0], jit(linen.apply)({"params": parameters}, x)[0])
    state = linen.apply({"params": parameters}, BATCH, LENGTH, nnx_method="init_state")
    apply = jit(linen.apply)
    first, state = apply({"params": parameters}, x[:, :3], state)
    second, _ = apply({"params": parameters}, x[:, 3:], state)
    agree(jit(layer(name))(x)[0], np.concatenate([first, second], axis=1))


def stack(name):
    """Blocks one after the other, parameters and states with a leading axis."""
    scanned = nn.scan(
        Residual,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=DEPTH,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(name)


@SOME
@pytest.mark.slow
def test_under_scan(name):
    x = inputs(LENGTH)
    variables = jit(stack(name).init)(jax.random.key(0), x, None)
    boxes = variables["params"]["ToLinen_0"]
    assert {box.names[0] for box in nnx.traversals.flatten_mapping(boxes).values()} == {"layers"}
    plain = nn.meta.unbox(variables)
    kernel = plain["params"]["ToLinen_0"]["out_proj"]["kernel"]
    assert kernel.shape[0] == DEPTH
    assert float(jnp.max(jnp.abs(kernel[0] - kernel[1]))) > 0

    want, block = x, jit(Residual(name).apply)
    for i in range(DEPTH):
        want, _ = block(jax.tree.map(lambda leaf, i=i: leaf[i], plain), want, None)
    apply = jit(stack(name).apply)
    agree(want, apply(variables, x, None)[0])

    states = jax.tree.map(lambda a: jnp.stack([a] * DEPTH), layer(name).init_state(BATCH, LENGTH))
    first, states = apply(plain, x[:, :3], states)
    second, _ = apply(plain, x[:, 3:], states)
    agree(want, np.concatenate([first, second], axis=1))
