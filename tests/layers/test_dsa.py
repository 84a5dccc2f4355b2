"""What trains the indexer of DSA, and nothing else."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.compiled import jit
from tests.layers.catalogue import inputs, layer
from tests.ratio import FLOAT32, error_ratio


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_loss_of_the_indexer_trains_the_indexer_alone(warm_up):
    graph, parameters = nnx.split(layer("dsa"))
    loss = lambda p, x: nnx.merge(graph, p).indexer_loss(x, warm_up=warm_up)  # noqa: E731
    gradients, of_inputs = jit(jax.grad(loss, (0, 1)))(parameters, inputs(24))
    assert not np.asarray(of_inputs).any()
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.asarray(gradient[...]).any() == str(path[0]).startswith("index_"), path


def test_the_loss_of_packed_rows_is_the_mean_over_real_tokens():
    x = inputs(24)
    ids = np.repeat([[0, 1, -1]], [10, 12, 2], axis=1).repeat(len(x), 0).astype(np.int32)
    loss = jit(lambda layer, x, ids=None: layer.indexer_loss(x, warm_up=True, segment_ids=ids))
    poisoned = np.where(ids[..., None] < 0, 1e3, x)
    first, second = (loss(layer("dsa"), x[:, part]) for part in (slice(0, 10), slice(10, 22)))
    want = (10 * first + 12 * second) / 22
    assert want > 1e-3
    assert error_ratio(want, loss(layer("dsa"), poisoned, ids)) <= FLOAT32
