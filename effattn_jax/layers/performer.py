"""Performer: softmax attention estimated by random features (Choromanski et al. 2020, arXiv:2009.14794)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.dispatch import Implementation
from effattn_jax.layers.buffer import Buffer, constant
from effattn_jax.layers.documents import forget_other_documents, new_document, no_document
from effattn_jax.layers.projection import Projection
from effattn_jax.linear import linear_attention
from effattn_jax.linear.favor import FavorState, draw_omega, favor_attention, favor_relu
from effattn_jax.typing import Array, Float, Hidden, Int, Positions, SegmentIds


class PerformerState(NamedTuple):
    """What the layer remembers; its size does not depend on the number of tokens."""

    memory: Float[Array, "B H M V+1"]  # in units of e^{key_max}; the last column is the normaliser
    key_max: Float[Array, "B H"]
    document: Int[Array, " B"]


class Performer(nnx.Module):
    """q, k, v = projections of the input; for every head, with m random features phi,

        S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t)
        o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps)
        output = W_out o

    The random vectors omega are a buffer that all heads share. They are drawn anew now and then in training, and stay
    in evaluation and while a state is in use (see `redraw`).

    Args:
      dim: D.
      heads: H.
      head_dim: K = V of a head; None means D / H.
      features: m; None means K ln K.
      kernel: "softmax", positive features e^{omega x - |x|^2 / 2}, stabilised by the running maximum of the keys'
        exponents (`effattn_jax.linear.favor`), or "relu", features relu(omega x) + 1e-3.
      orthogonal: draw omega in blocks of K orthogonal rows: less variance.
      scaling: their lengths, "norm" (as of normal vectors) or "sqrt" (all sqrt(K)).
      eps: added to features ("softmax") and denominator.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        features: int | None = None,
        kernel: str = "softmax",
        orthogonal: bool = True,
        scaling: str = "norm",
        eps: float = 1e-6,
        dtype: Any = jnp.float32,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or (head_dim is None and dim % heads):
            checks.fail("heads", heads, f"a divisor of dim = {dim}, or head_dim")
        if kernel not in ("softmax", "relu"):
            checks.fail("kernel", repr(kernel), "softmax or relu")
        head_dim = dim // heads if head_dim is None else head_dim
        features = max(1, int(head_dim * math.log(head_dim))) if features is None else features
        if features < 1:
            checks.fail("features", features, "at least 1")
        self.heads, self.head_dim, self.features, self.kernel, self.eps = heads, head_dim, features, kernel, eps
        self.orthogonal, self.scaling, self.dtype, self.implementation = orthogonal, scaling, dtype, implementation

        self.q_proj = Projection(dim, heads * head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k_proj = Projection(dim, heads * head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v_proj = Projection(dim, heads * head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out_proj = Projection(heads * head_dim, dim, ("heads", "embed"), dtype=dtype, rngs=rngs)
        self.omega = Buffer(self._draw(rngs.params()), axes=("state", "head"))

    def _draw(self, key: Array) -> Float[Array, "M K"]:
        return draw_omega(key, self.features, self.head_dim, orthogonal=self.orthogonal, scaling=self.scaling)

    def init_state(self, batch_size: int, max_length: int) -> PerformerState:
        """`max_length` is of no consequence here: the state has one size."""
        return PerformerState(
            memory=jnp.zeros((batch_size, self.heads, self.features, self.head_dim + 1), jnp.float32),
            key_max=jnp.zeros((batch_size, self.heads), jnp.float32),
            document=no_document(batch_size),
        )

    def mixing_flops(self, length: int) -> float:
        """Floating-point operations a token needs beside the projections: features of q and k, one write, one read."""
        return 4 * self.heads * self.features * (2 * self.head_dim + 1)

    def __call__(
        self,
        x: Hidden,
        state: PerformerState | None = None,
        *,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> tuple[Hidden, PerformerState | None]:
        """`positions` is of no consequence here."""
        checks.check_segment_ids(segment_ids, *x.shape[:2])
        if state is not None:
            state = forget_other_documents(state, segment_ids)
        omega = constant(self.omega)
        where: dict[str, Any] = {"segment_ids": segment_ids, "implementation": self.implementation}
        shape = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (project(x).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.kernel == "softmax":
            before = None if state is None else FavorState(state.memory, state.key_max)
            o, (memory, key_max) = favor_attention(q, k, v, omega, eps=self.eps, initial_state=before, **where)
        else:
            phi_q, phi_k = (favor_relu(x, omega).astype(self.dtype) for x in (q, k))
            memory_before = None if state is None else state.memory
            o, memory = linear_attention(phi_q, phi_k, v, eps=self.eps, initial_state=memory_before, **where)
            key_max = jnp.zeros(memory.shape[:2], jnp.float32)
        y = self.out_proj(o.reshape(*x.shape[:2], self.heads * self.head_dim))
        if state is None:
            return y, None
        return y, PerformerState(memory, key_max, new_document(state.document, segment_ids))


def redraw[Model: nnx.Module](model: Model, key: Array) -> Model:
    """The model with new random vectors in all its performers, stacked ones too; the rest is shared with `model`.

    A training loop calls it every thousand steps or so, with a key made of the step, so that a run that resumes draws
    the same:

        if step % 1000 == 0:
            model = jax.jit(redraw)(model, jax.random.fold_in(key, step))
    """
    model = nnx.merge(*nnx.split(model))  # variables of its own
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, Performer):
            stack = module.omega.shape[:-2]  # of a model that repeats its layers
            keys = jax.random.split(jax.random.fold_in(key, i), stack)
            draw = module._draw
            for _ in stack:
                draw = jax.vmap(draw)
            module.omega[...] = draw(keys)
    return model
