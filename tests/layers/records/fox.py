from effattn_jax.layers import ForgettingAttention
from tests.layers.records.record import Record

FOX = {"heads": 4, "kv_heads": 2, "head_dim": 4}
PRO = {"kv_shift": True, "qk_norm": True, "output_norm": True, "output_gate": True}

RECORDS = {
    "fox": Record(ForgettingAttention, FOX, slow=True),
    "fox_pro": Record(ForgettingAttention, FOX | PRO),
}
