from effattn_jax.layers import PathAttention
from tests.layers.records.record import Record

RECORDS = {
    "path": Record(PathAttention, {"heads": 4, "kv_heads": 2, "rank": 3, "forget_gate": True}),
    "path_qk_norm": Record(PathAttention, {"heads": 2, "rank": None, "qk_norm": True}, slow=True),
}
