from effattn_jax.layers import DSA, NSA, InfLLM2, MoBA, SharedNSA
from tests.layers.records.record import Record

ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 4}
WINDOWS = {"kernel_size": 2, "kernel_stride": 1, "block_size": 2}

RECORDS = {
    "moba": Record(MoBA, ATTENTION | {"block_size": 3, "topk": 2}, chooses=True),
    "nsa": Record(NSA, ATTENTION | WINDOWS | {"topk": 3, "local_blocks": 1, "window": 3}, chooses=True),
    "nsa_mean": Record(
        NSA, ATTENTION | WINDOWS | {"topk": 3, "window": 3, "mean": True, "qk_norm": True}, slow=True, chooses=True
    ),
    "nsa_shared": Record(SharedNSA, ATTENTION | {"block_size": 2, "topk": 4, "window": 3}, slow=True, chooses=True),
    "nsa_shared_few": Record(SharedNSA, ATTENTION | {"block_size": 4, "topk": 2, "window": 3}, slow=True, chooses=True),
    "infllm2": Record(InfLLM2, ATTENTION | WINDOWS | {"topk": 2, "window": 2, "dense_len": 0}, chooses=True),
    "infllm2_dense": Record(
        InfLLM2, ATTENTION | WINDOWS | {"topk": 2, "window": 2, "dense_len": 200}, slow=True, chooses=True
    ),
    "dsa": Record(
        DSA,
        ATTENTION | {"index_heads": 2, "index_dim": 4, "topk": 4},
        chooses=True,
        idle=("index_",),  # learns by a loss of its own
    ),
}
