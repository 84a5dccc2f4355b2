from effattn_jax.layers import LogLinear, MesaNet
from tests.layers.records.record import Record

LOG_LINEAR = {"head_dim": 8, "state_dim": 6, "max_length": 140}

RECORDS = {
    "log_linear": Record(LogLinear, LOG_LINEAR),
    "log_linear_groups": Record(LogLinear, LOG_LINEAR | {"groups": 2, "conv_width": 5}, slow=True),
    "mesa_net": Record(MesaNet, {"heads": 2, "head_dim": 8}),
    "mesa_net_gate": Record(MesaNet, {"heads": 4, "head_dim": 4, "output_gate": True, "conv_width": 5}, slow=True),
}
