"""Test-time training: a memory that is a small network, trained on the sequence while it reads it.

Let f be the network with weights W (biases among them), l_j(W) = 1/2 |LN(f(k_j; W)) - (v_j - k_j)|^2, and cut a
document into mini-batches. A mini-batch starts from W, and its token of place i = 1, 2, ... reads

    W_i = W - token_scale_i * sum_{j <= i} lr_j grad l_j(W)        o_i = q_i + LN(f(q_i; W_i))

The next mini-batch starts from the last W_i. Sun et al. 2024, arXiv:2407.04620. `ttt_linear` and `ttt_mlp` are this
with networks of one and two layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation, dispatch
from effattn_jax.linear.arguments import check_gate, choose_form, real_tokens
from effattn_jax.linear.inner_loss import Network
from effattn_jax.linear.ttt_forms import Learner, Tokens, TTTState, aligned, chunkwise, recurrent
from effattn_jax.precision import accumulation_dtype
from effattn_jax.typing import Array, Float, SegmentIds

FORMS = ("recurrent", "chunkwise")


def ttt(
    mechanism: str,
    tokens: Tokens,
    learner: Learner,
    initial_state: TTTState | None,
    segment_ids: SegmentIds | None,
    form: str | None,
    implementation: Implementation,
) -> tuple[Float[Array, "B T H K"], TTTState]:
    """The engine, for a network of any depth; arguments as in `ttt_linear`, their shapes being checked here."""
    checks.check_choice("form", form, FORMS)
    _check_tokens(tokens, learner, segment_ids)
    if initial_state is not None:
        _check_state(initial_state, tokens.q.shape[0], learner.network)
    accumulate = accumulation_dtype(tokens.q.dtype)
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, accumulate), tree)  # noqa: E731
    if initial_state is not None:
        initial_state = TTTState(
            cast(initial_state.weights), cast(initial_state.gathered), jnp.asarray(initial_state.place)
        )
    tokens = Tokens(*(real_tokens(x, segment_ids) for x in tokens))
    out, state = dispatch(
        mechanism,
        {"xla": _xla},
        implementation,
        ("xla",),
        cast(tokens),
        cast(learner),
        initial_state,
        segment_ids,
        choose_form(form, tokens.q.shape[1]),
    )
    return real_tokens(out, segment_ids).astype(tokens.q.dtype), state


def _xla(
    tokens: Tokens, learner: Learner, initial_state: TTTState | None, segment_ids: Array | None, form: str
) -> tuple[Array, TTTState]:
    if form == "recurrent":
        return recurrent(tokens, learner, initial_state, segment_ids)
    if initial_state is None and segment_ids is None:
        return aligned(tokens, learner)
    return chunkwise(tokens, learner, initial_state, segment_ids)


def check_network(*layers: tuple[str, Any, str, Any]) -> None:
    """Layers in order, each as the names and arrays of its W and b. The last returns what the first reads."""
    name, first, *_ = layers[0]
    checks.check_rank(name, first, 3, "[H, in, out]")
    heads, dim, width = jnp.shape(first)
    read = dim
    for i, (weight_name, W, bias_name, b) in enumerate(layers):
        returned = dim if i == len(layers) - 1 else width
        check_gate(weight_name, W, ((heads, read, returned), "[H, in, out]"))
        check_gate(bias_name, b, ((heads, returned), "[H, out]"))
        read = returned


def _check_tokens(tokens: Tokens, learner: Learner, segment_ids: Any) -> None:
    heads, dim, _ = learner.network[0].W.shape
    checks.check_rank("q", tokens.q, 4, "[B, T, H, K]")
    batch, length = tokens.q.shape[:2]
    for name, x in zip("qkv", tokens[:3], strict=True):
        checks.check_shape(name, x, (batch, length, heads, dim), "[B, T, H, K]")
        checks.check_floating(name, x)
    check_gate("lr", tokens.lr, ((batch, length, heads), "[B, T, H]"))
    checks.check_rank("token_scale", learner.token_scale, 1, "[mini-batch]")
    checks.check_floating("token_scale", learner.token_scale)
    if not learner.token_scale.size:
        checks.fail("token_scale", "no entry", "one for each token of a mini-batch")
    check_gate("ln_scale", learner.norm.scale, ((heads, dim), "[H, K]"))
    check_gate("ln_bias", learner.norm.bias, ((heads, dim), "[H, K]"))
    checks.check_segment_ids(segment_ids, batch, length)


def _check_state(state: TTTState, batch: int, network: Network) -> None:
    for part in ("weights", "gathered"):
        layers = getattr(state, part)
        if len(layers) != len(network):
            checks.fail(f"initial_state.{part}", f"{len(layers)} layers", f"{len(network)}")
        for i, (layer, like) in enumerate(zip(layers, network, strict=True)):
            for letter, x, own in zip("Wb", layer, like, strict=True):
                check_gate(f"initial_state.{part}[{i}].{letter}", x, ((batch, *own.shape), "[B, H, ...]"))
    checks.check_shape("initial_state.place", state.place, (batch,), "[B]")
    if not jnp.issubdtype(jnp.result_type(state.place), jnp.integer):
        checks.fail("initial_state.place", f"dtype {jnp.result_type(state.place)}", "an integer dtype")
