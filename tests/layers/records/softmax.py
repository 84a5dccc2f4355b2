from effattn_jax.layers import Attention, LatentAttention
from tests.layers.records.record import Record

LATENT = {"heads": 3, "latent_dim": 5, "key_dim": 4, "rope_dim": 2, "value_dim": 3}
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 4}

RECORDS = {
    "attention": Record(Attention, ATTENTION),
    "attention_window": Record(Attention, ATTENTION | {"window": 5}),
    "attention_window_sinks": Record(Attention, ATTENTION | {"kv_heads": 1, "window": 4, "sinks": True}),
    "attention_qk_norm": Record(Attention, ATTENTION | {"qk_norm": True, "rope_fraction": 0.5}, slow=True),
    "attention_no_rope": Record(
        Attention, ATTENTION | {"kv_heads": 4, "rope_theta": None, "logits_soft_cap": 3.0}, slow=True
    ),
    "mla": Record(LatentAttention, LATENT | {"query_rank": 6, "rope_interleaved": True}),
    "mla_no_rope": Record(LatentAttention, LATENT | {"rope_theta": None}, slow=True),
}
