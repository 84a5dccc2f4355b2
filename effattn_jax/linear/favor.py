"""FAVOR+: positive random features of the softmax kernel (Performer; Choromanski et al. 2020, arXiv:2009.14794).

    E[phi(q) . phi(k)] = e^{q . k / sqrt(K)}        phi(x) = m^{-1/2} e^{omega x' - |x'|^2 / 2},  x' = K^{-1/4} x

over m random vectors omega, standard normal or, with less variance, orthogonal in blocks of K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.linear.arguments import check_state, real_tokens
from effattn_jax.linear.linear_attention import linear_attention
from effattn_jax.precision import accumulation_dtype, contract
from effattn_jax.typing import Array, Float, Keys, Queries, SegmentIds, Values

Omega = Float[Array, "M K"]


def draw_omega(key: Array, features: int, dim: int, *, orthogonal: bool = True, scaling: str = "norm") -> Omega:
    """[M, K]: rows of blocks of K orthonormal ones, from the QR decomposition of normal matrices.

    Args:
      key: a key of `jax.random`.
      features: M.
      dim: K.
      orthogonal: without it the rows are independent standard normal vectors.
      scaling: "norm", each row as long as another normal vector, or "sqrt", each row of length sqrt(K).
    """
    checks.check_choice("scaling", scaling, ("norm", "sqrt"))
    directions, lengths = jax.random.split(key)
    normal = jax.random.normal(lengths, (features, dim))
    if not orthogonal:
        return normal
    blocks = -(-features // dim)
    rows, triangle = jnp.linalg.qr(jax.random.normal(directions, (blocks, dim, dim)))
    # QR fixes the signs of Q by convention: without them rows are uniform on the sphere, and the estimate unbiased
    rows *= jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None, :]
    rows = rows.reshape(blocks * dim, dim)[:features]
    return rows * (dim**0.5 if scaling == "sqrt" else jnp.linalg.norm(normal, axis=-1, keepdims=True))


def favor_exponent(x: Float[Array, "*batch K"], omega: Omega) -> Float[Array, "*batch M"]:
    """omega x' - |x'|^2 / 2, the logarithm of the features but for the factor m^{-1/2}; in float32."""
    x = x.astype(accumulation_dtype(x.dtype)) * x.shape[-1] ** -0.25
    return contract("...k,mk->...m", x, omega.astype(x.dtype)) - jnp.sum(jnp.square(x), axis=-1, keepdims=True) / 2


def favor_plus(
    x: Float[Array, "*batch K"], omega: Omega, stabiliser: Array | float = 0.0, eps: float = 0.0
) -> Float[Array, "*batch M"]:
    """m^{-1/2} (e^{omega x' - |x'|^2 / 2 - c} + eps), c the stabiliser, which broadcasts against [..., M]."""
    return (jnp.exp(favor_exponent(x, omega) - stabiliser) + eps) * omega.shape[0] ** -0.5


def favor_relu(x: Float[Array, "*batch K"], omega: Omega, eps: float = 1e-3) -> Float[Array, "*batch M"]:
    """m^{-1/2} (relu(omega x') + eps): generalised attention, another kernel with the same cost and no exponential."""
    x = x.astype(accumulation_dtype(x.dtype)) * x.shape[-1] ** -0.25
    return (jax.nn.relu(contract("...k,mk->...m", x, omega.astype(x.dtype))) + eps) * omega.shape[0] ** -0.5


class FavorState(NamedTuple):
    """The memory, whose last column is the normaliser, in units of e^{key_max}."""

    memory: Float[Array, "B H M V+1"]
    key_max: Float[Array, "B H"]  # largest exponent of the keys so far; of no consequence while the memory is empty


def favor_attention(
    q: Queries,
    k: Keys,
    v: Values,
    omega: Omega,
    *,
    eps: float = 1e-6,
    initial_state: FavorState | None = None,
    segment_ids: SegmentIds | None = None,
    form: str | None = None,
    implementation: Implementation = None,
) -> tuple[Values, FavorState]:
    """Normalised linear attention with the features of `favor_plus`, an estimate of softmax attention.

    A constant c taken out of every exponent of the keys, or of one query, cancels in the quotient. Of a query it is
    its largest exponent. For keys it must be the same for all that are added up, and must not look at later tokens:
    it is the running maximum c_t of the exponents of all keys so far, and the memory in units of e^{c_t} decays by
    e^{c_{t-1} - c_t} <= 1, a scalar decay. So no feature overflows, and any split into calls gives the same result.

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      omega: [M, K] from `draw_omega`.
      eps: added to every feature before the factor m^{-1/2}, and to the denominator.
      initial_state, segment_ids, form, implementation: see `scalar_decay`.

    Returns:
      out [B, T, H, V] in q's dtype, and the final state in float32.

    Raises:
      ValueError: shapes, dtypes, head counts, form or segment ids that do not fit.
    """
    checks.check_rank("q", q, 4, "[B, T, H, K]")
    checks.check_shape("k", k, q.shape, "[B, T, H, K]")
    batch, length, heads, key_dim = q.shape
    checks.check_shape("omega", omega, (None, key_dim), "[M, K]")
    checks.check_segment_ids(segment_ids, batch, length)
    exponents = favor_exponent(k, omega)  # [B, T, H, F]
    memory, before = None, jnp.full((batch, heads), -jnp.inf, exponents.dtype)
    if initial_state is not None:
        check_state(initial_state.key_max, (batch, heads), "[B, H]")
        memory = initial_state.memory
        empty = jnp.all(memory[..., -1] == 0, axis=-1)  # features are positive: no key has been written
        before = jnp.where(empty, -jnp.inf, initial_state.key_max)
    top, key_max = _running_max(jax.lax.stop_gradient(jnp.max(exponents, axis=-1)), before, segment_ids)
    earlier = jnp.concatenate([before[:, None], top], axis=1)[:, :-1]
    log_decay = jnp.where(jnp.isfinite(earlier) & (earlier < top), earlier - top, 0)  # documents do not share a maximum
    factor = omega.shape[0] ** -0.5
    below = exponents - top[..., None]
    phi_k = (jnp.exp(below if segment_ids is None else real_tokens(below, segment_ids)) + eps) * factor
    exponents = favor_exponent(q, omega)
    phi_q = (jnp.exp(exponents - jax.lax.stop_gradient(jnp.max(exponents, axis=-1, keepdims=True))) + eps) * factor
    out, memory = linear_attention(
        phi_q.astype(q.dtype),
        phi_k.astype(k.dtype),
        v,
        log_decay,
        eps=eps,
        initial_state=memory,
        segment_ids=segment_ids,
        form=form,
        implementation=implementation,
    )
    return out, FavorState(memory, key_max)


def _running_max(
    x: Float[Array, "B T H"], before: Float[Array, "B H"], segment_ids: SegmentIds | None
) -> tuple[Float[Array, "B T H"], Float[Array, "B H"]]:
    """The largest so far in the document of each token, and at the end (0 where no token has been seen)."""
    if segment_ids is None:
        ids = jnp.zeros((x.shape[0], x.shape[1] + 1), jnp.int32)
    else:
        largest = jnp.iinfo(segment_ids.dtype).max
        first = jnp.min(jnp.where(segment_ids >= 0, segment_ids, largest), axis=1, initial=largest)
        ids = jnp.concatenate([first[:, None], segment_ids], axis=1)

    def join(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        """Of two runs of tokens: the last document, and its maximum."""
        (a, x), (b, y) = earlier, later
        both = jnp.where(a == b, jnp.maximum(x, y), y)
        return jnp.maximum(a, b), jnp.where(b < 0, x, both)

    x = jnp.concatenate([before[:, None], x], axis=1)
    _, top = jax.lax.associative_scan(join, (ids[..., None], x), axis=1)
    return top[:, 1:], jnp.where(jnp.isfinite(top[:, -1]), top[:, -1], 0)
