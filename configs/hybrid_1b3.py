"""A 1.3B hybrid for a slice of eight accelerators or more: fsdp over all of them.

python -m experiments.train --config=configs/hybrid_1b3.py --distributed
"""

from ml_collections import ConfigDict

from configs.hybrid_125m import hybrid


def get_config() -> ConfigDict:
    config = hybrid(dim=2048, mlp_dim=5632, repeats=6, heads=32, kv_heads=8, batch_size=128, learning_rate=4e-4)
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
