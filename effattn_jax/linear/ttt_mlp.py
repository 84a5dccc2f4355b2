"""TTT-MLP: test-time training of a network with one hidden layer (Sun et al. 2024, arXiv:2407.04620)."""

from effattn_jax.dispatch import Implementation
from effattn_jax.linear.inner_loss import Affine, InnerNorm
from effattn_jax.linear.ttt import FORMS, check_network, ttt
from effattn_jax.linear.ttt_forms import Learner, Tokens, TTTState
from effattn_jax.typing import Array, Float, SegmentIds

__all__ = ["FORMS", "TTTState", "ttt_mlp"]


def ttt_mlp(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    lr: Float[Array, "B T H"],
    token_scale: Float[Array, " b"],
    W1: Float[Array, "H K M"],
    b1: Float[Array, "H M"],
    W2: Float[Array, "H M K"],
    b2: Float[Array, "H K"],
    ln_scale: Float[Array, "H K"],
    ln_bias: Float[Array, "H K"],
    *,
    initial_state: TTTState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H K"], TTTState]:
    """The memory is f(x) = gelu(x W1 + b1) W2 + b2, gelu by tanh, M = 4 K in the paper; the rest is as in `ttt_linear`:

        weights_i = weights - token_scale_i * sum_{j <= i} lr_j grad l_j        o_i = q_i + LN(f(q_i; weights_i))

    Args:
      q, k, v, lr, token_scale, ln_scale, ln_bias, initial_state, segment_ids, form, implementation: see `ttt_linear`.
      W1, b1, W2, b2: [H, K, M], [H, M], [H, M, K] and [H, K], what every document starts from.

    Returns:
      out [B, T, H, K] in q's dtype and the final state in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes, dtypes, form or segment ids that do not fit.
    """
    check_network(("W1", W1, "b1", b1), ("W2", W2, "b2", b2))
    learner = Learner((Affine(W1, b1), Affine(W2, b2)), InnerNorm(ln_scale, ln_bias), token_scale)
    tokens = Tokens(q, k, v, lr)
    return ttt("ttt_mlp", tokens, learner, initial_state, segment_ids, form, implementation)
