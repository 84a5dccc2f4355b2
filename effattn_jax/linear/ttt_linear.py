"""TTT-Linear: test-time training of an affine map (Sun et al. 2024, arXiv:2407.04620)."""

from effattn_jax.dispatch import Implementation
from effattn_jax.linear.inner_loss import Affine, InnerNorm
from effattn_jax.linear.ttt import FORMS, check_network, ttt
from effattn_jax.linear.ttt_forms import Learner, Tokens, TTTState
from effattn_jax.typing import Array, Float, SegmentIds

__all__ = ["FORMS", "TTTState", "ttt_linear"]


def ttt_linear(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    lr: Float[Array, "B T H"],
    token_scale: Float[Array, " b"],
    W: Float[Array, "H K K"],
    b: Float[Array, "H K"],
    ln_scale: Float[Array, "H K"],
    ln_bias: Float[Array, "H K"],
    *,
    initial_state: TTTState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T H K"], TTTState]:
    """The memory is f(x) = x W + b, one for every head. A mini-batch starts from (W, b); with the loss of a token
    l_j = 1/2 |LN(f(k_j)) - (v_j - k_j)|^2 and its gradients at those weights, the token of place i = 1 .. b reads

        (W_i, b_i) = (W, b) - token_scale_i * sum_{j <= i} lr_j grad l_j        o_i = q_i + LN(q_i W_i + b_i)

    and the next mini-batch starts from the last (W_i, b_i).

    Args:
      q, k, v: [B, T, H, K].
      lr: [B, T, H], the step of token j as a key, all factors included: base_lr * sigmoid(.) / K in the paper.
      token_scale: [b], the factor of place i, which acts on the token as a query: max(1 / i + learned, 0) in the paper.
        Its length is the size of a mini-batch, 16 in the paper.
      W, b: [H, K, K] and [H, K], what every document starts from.
      ln_scale, ln_bias: [H, K] of the layer norm LN.
      initial_state: the memory of the first document of each row, which may stand inside a mini-batch; None: it begins.
      segment_ids: [B, T] documents of packed rows, never decreasing along a row. Each starts from (W, b) with a new
        mini-batch. Negative ids mark padding: such a token is passed over.
      form: "recurrent" (primal: the weights of every token, a `lax.scan`) or "chunkwise" (dual: matrix products over a
        mini-batch, a scan over mini-batches): algorithms for one answer. None takes the single step for T = 1, else
        chunkwise.
      implementation: where it runs, see `effattn_jax.dispatch`; "xla" is there.

    Returns:
      out [B, T, H, K] in q's dtype and the final state in float32 (float64 for float64 inputs). Nothing is detached:
      gradients flow through the inner steps into every argument. The backward pass keeps the weights of a few
      mini-batches and recomputes those between.

    Raises:
      ValueError: shapes, dtypes, form or segment ids that do not fit.
    """
    check_network(("W", W, "b", b))
    learner = Learner((Affine(W, b),), InnerNorm(ln_scale, ln_bias), token_scale)
    tokens = Tokens(q, k, v, lr)
    return ttt("ttt_linear", tokens, learner, initial_state, segment_ids, form, implementation)
