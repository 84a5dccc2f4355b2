from effattn_jax.layers import Titans, TitansMAC, TitansMAG, TitansMAL
from tests.layers.records.record import Record

TITANS = {"heads": 2, "head_dim": 6, "expand": 1, "chunk": 4, "max_step": 0.3}
LINEAR = TITANS | {"depth": 1, "persistent": 3}

RECORDS = {
    "titans": Record(Titans, TITANS),
    "titans_linear": Record(Titans, TITANS | {"depth": 1, "chunk": 1, "conv_width": 3}, slow=True),
    "titans_silu": Record(Titans, TITANS | {"depth": 3, "activation": "silu", "chunk": 16}, slow=True),
    "titans_mac": Record(TitansMAC, LINEAR | {"segment": 5}),
    "titans_mac_deep": Record(TitansMAC, TITANS | {"segment": 16, "persistent": 0, "rope_theta": None}, slow=True),
    "titans_mag": Record(TitansMAG, LINEAR | {"window": 5}),
    "titans_mag_deep": Record(TitansMAG, TITANS | {"window": 2, "persistent": 0, "rope_theta": None}, slow=True),
    "titans_mal": Record(TitansMAL, LINEAR | {"window": 5}),
}
