from effattn_jax.layers import HGRN, RGLRU, RWKV4, Mamba, Mamba3
from tests.layers.records.record import Record

MAMBA = {"state_dim": 6, "dt_rank": 3}
RG_LRU = {"width": 24, "heads": 3}

RECORDS = {
    "mamba": Record(Mamba, MAMBA, slow=True),
    "mamba_weightless_norms": Record(Mamba, MAMBA | {"norm": "weightless"}, slow=True),
    "mamba_learned_norms": Record(Mamba, MAMBA | {"norm": "learned", "conv_width": 5}),
    "mamba3": Record(Mamba3, {"head_dim": 8, "state_dim": 8}),
    "mamba3_groups": Record(Mamba3, {"head_dim": 8, "state_dim": 6, "groups": 2, "rope_fraction": 1.0}, slow=True),
    "rg_lru": Record(RGLRU, RG_LRU),
    "rg_lru_one_block": Record(RGLRU, {"heads": 1, "conv_width": 3}, slow=True),
    "hgrn": Record(HGRN, {"layer_index": 1, "layer_count": 3}),
    "rwkv4": Record(RWKV4, {}),
    "rwkv4_wide": Record(RWKV4, {"width": 24, "layer_index": 1, "layer_count": 3}, slow=True),
    "hgrn_wide": Record(HGRN, {"expand": 2, "lower_bound": 0.3}, slow=True),
}
