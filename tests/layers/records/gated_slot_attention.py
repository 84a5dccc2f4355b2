from effattn_jax.layers import GatedSlotAttention
from tests.layers.records.record import Record

# The norm's eps is such that a difference over 1e-3 is a slope.
GSA = {"heads": 2, "slots": 5, "gate_temperature": 2.0, "norm_eps": 0.1}

RECORDS = {
    "gsa": Record(GatedSlotAttention, GSA),
    "gsa_groups": Record(
        GatedSlotAttention, GSA | {"heads": 4, "kv_heads": 2, "expand_k": 2.0, "expand_v": 0.5}, slow=True
    ),
}
