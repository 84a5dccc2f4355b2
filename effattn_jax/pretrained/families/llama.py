"""The tensors that most transformer checkpoints share, under the names of Llama's implementation."""

from collections.abc import Sequence

from effattn_jax.pretrained.entry import Entry, linear, norm, same
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.layout import ROWS


def outside(config: Config) -> Sequence[Entry]:
    """Embedding, last norm, and the head where it is not the embedding."""
    tied = config.get("tie_word_embeddings", False)
    return [
        *same("model.embed_tokens.weight", "embedding"),
        *norm("model.norm", "final_norm"),
        *([] if tied else linear("lm_head", "head")),
    ]


def attention(below: str, *, bias: bool = False, out_bias: bool = False) -> list[Entry]:
    """q_proj, k_proj, v_proj and o_proj of `effattn_jax.layers.Attention`."""
    return [
        *linear(f"{below}.q_proj", "mixer.q_proj", bias=bias),
        *linear(f"{below}.k_proj", "mixer.k_proj", bias=bias),
        *linear(f"{below}.v_proj", "mixer.v_proj", bias=bias),
        *linear(f"{below}.o_proj", "mixer.out_proj", bias=out_bias),
    ]


def gated_mlp(below: str, ours: str = "mlp", *, bias: bool = False) -> list[Entry]:
    """gate_proj, up_proj and down_proj of a gated feed-forward layer."""
    return [
        *linear(f"{below}.gate_proj", f"{ours}.gate", bias=bias),
        *linear(f"{below}.up_proj", f"{ours}.up", bias=bias),
        *linear(f"{below}.down_proj", f"{ours}.down", bias=bias),
    ]


def experts(below: str, count: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> list[Entry]:
    """A tensor for each expert of `effattn_jax.layers.MoE`: the names of gate, up and down."""
    return [
        Entry(f"{below}.{expert}.{theirs}.weight", (f"mlp.{ours}.kernel",), ROWS, (expert,))
        for expert in range(count)
        for theirs, ours in zip(names, ("gate", "up", "down"), strict=True)
    ]


def router(tensor: str) -> list[Entry]:
    return [Entry(f"{tensor}.weight", ("mlp.router.kernel",), ROWS)]
