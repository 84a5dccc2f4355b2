"""Which experts a token goes to, and how much each counts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn_jax import checks
from effattn_jax.layers.projection import LECUN
from effattn_jax.typing import Array, Float, Int

SCORES = ("softmax", "sigmoid")


class Router(nnx.Module):
    """s = softmax(W x) or sigmoid(W x) over E experts; the k with the largest s (+ c) are taken, each with weight s.

    Args:
      dim, experts, top_k: D, E and k.
      score: "softmax" (Mixtral, arXiv:2401.04088) or "sigmoid" (DeepSeek-V3, arXiv:2412.19437).
      renormalise: weights are divided by their sum.
      correction: a bias c of each expert that counts for the choice alone and gets no gradient (arXiv:2408.15664).
      groups, top_groups: experts lie in equal groups; only those of the `top_groups` groups whose two best have the
        largest sum can be taken (DeepSeek-V3).
      scale: weights are multiplied by it.
      bias: of the projection.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalise: bool = False,
        correction: bool = False,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        if score not in SCORES:
            checks.fail("score", repr(score), f"one of {', '.join(SCORES)}")
        if experts % groups or not 1 <= top_groups <= groups:
            checks.fail("groups", f"{top_groups} of {groups}", f"some of a number that divides {experts} experts")
        if not 1 <= top_k <= experts // groups * top_groups:
            checks.fail("top_k", top_k, f"1 .. {experts // groups * top_groups}, the experts that can be taken")
        self.top_k, self.score, self.renormalise, self.scale = top_k, score, renormalise, scale
        self.groups, self.top_groups = groups, top_groups
        self.kernel = nnx.Param(LECUN(rngs.params(), (dim, experts), jnp.float32), axes=("embed", "state"))
        self.bias = nnx.Param(jnp.zeros((experts,), jnp.float32), axes=("state",)) if bias else None
        self.correction = nnx.Param(jnp.zeros((experts,), jnp.float32), axes=("state",)) if correction else None

    def __call__(self, x: Float[Array, "N D"]) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
        """Weights in float32, and experts, the best first."""
        logits = jnp.matmul(x, self.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)
        scores = jax.nn.softmax(logits, axis=-1) if self.score == "softmax" else jax.nn.sigmoid(logits)
        choice = jax.lax.stop_gradient(scores)
        if self.correction is not None:
            choice += jax.lax.stop_gradient(self.correction[...].astype(jnp.float32))
        if self.groups > 1:
            choice = self._of_best_groups(choice)
        taken = jax.lax.top_k(choice, self.top_k)[1]
        weights = jnp.take_along_axis(scores, taken, axis=-1)
        if self.renormalise:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        return weights * self.scale, taken

    def _of_best_groups(self, choice: Float[Array, "N E"]) -> Float[Array, "N E"]:
        """-inf for experts of other groups."""
        grouped = choice.reshape(len(choice), self.groups, -1)
        best_two: Any = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
        taken = jax.lax.top_k(jnp.sum(best_two, axis=-1), self.top_groups)[1]
        kept = jnp.any(taken[:, :, None] == jnp.arange(self.groups), axis=1)
        return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
