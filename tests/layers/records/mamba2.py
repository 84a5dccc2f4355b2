from effattn_jax.layers import Mamba2
from tests.layers.records.record import Record

MAMBA2 = {"head_dim": 8, "state_dim": 6}

RECORDS = {
    "mamba2": Record(Mamba2, MAMBA2, slow=True),
    "mamba2_groups": Record(Mamba2, MAMBA2 | {"groups": 2, "conv_width": 5}),
}
