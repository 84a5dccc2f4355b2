"""How a sub-layer joins the residual stream."""

from collections.abc import Mapping
from typing import NamedTuple

from effattn_jax.typing import Hidden


class Residual(NamedTuple):
    """x' = skip * (norm(x) if normed else x) + branch * f(norm(x)).

    Args:
      skip, branch: alpha and beta of MiniMax-01 (arXiv:2501.08313); MiniCPM has a branch of 1.4 / sqrt(layers)
        (arXiv:2404.06395).
      normed: what goes past the sub-layer is its normalised input (MiniMax-01's post-norm).
    """

    skip: float = 1.0
    branch: float = 1.0
    normed: bool = False

    @classmethod
    def of(cls, options: "Residual | Mapping[str, float | bool] | None") -> "Residual":
        """From the options of a config."""
        if isinstance(options, Residual):
            return options
        return cls(**dict(options or {}))  # type: ignore[arg-type]

    def __call__(self, x: Hidden, normed: Hidden, y: Hidden) -> Hidden:
        past = normed if self.normed else x
        past = past if self.skip == 1 else past * self.skip
        return past + (y if self.branch == 1 else y * self.branch)
