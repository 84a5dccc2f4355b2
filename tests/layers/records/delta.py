from effattn_jax.layers import (
    Comba,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedDeltaProduct,
    KimiDeltaAttention,
)
from tests.layers.records.record import Record

DELTA = {"heads": 2, "head_dim": 8, "expand_v": 1.0}

RECORDS = {
    "delta_net": Record(DeltaNet, DELTA | {"allow_negative_eigenvalues": True, "expand_v": 1.5}),
    "delta_net_sum": Record(
        DeltaNet, DELTA | {"qk_activation": "elu", "qk_norm": "sum", "output_gate": True, "conv_width": 5}, slow=True
    ),
    "gated_delta_net": Record(GatedDeltaNet, DELTA | {"value_heads": 4, "allow_negative_eigenvalues": True}),
    "gated_delta_net_no_gate": Record(GatedDeltaNet, DELTA | {"output_gate": False, "conv_width": 3}, slow=True),
    "kda": Record(KimiDeltaAttention, DELTA | {"gate_rank": 3}),
    "kda_bounded": Record(
        KimiDeltaAttention, DELTA | {"value_heads": 4, "lower_bound": -5.0, "gate_bias": True}, slow=True
    ),
    "gated_delta_product": Record(GatedDeltaProduct, DELTA),
    "delta_product": Record(
        GatedDeltaProduct,
        DELTA
        | {
            "value_heads": 4,
            "householders": 3,
            "forget_gate": False,
            "output_gate": False,
            "allow_negative_eigenvalues": False,
        },
        slow=True,
    ),
    "comba": Record(Comba, DELTA | {"expand_v": 0.5}),
    "comba_groups": Record(Comba, DELTA | {"value_heads": 4, "normalize_feedback": True}, slow=True),
    "gated_delta_net2": Record(GatedDeltaNet2, DELTA | {"value_heads": 4, "expand_v": 0.5}),
}
