"""A 350M hybrid for one to eight accelerators, parameters cut over the fsdp axis.

python -m experiments.train --config=configs/hybrid_350m.py --config.mesh.data=1 --config.mesh.fsdp=-1
"""

from ml_collections import ConfigDict

from configs.hybrid_125m import hybrid


def get_config() -> ConfigDict:
    return hybrid(dim=1024, mlp_dim=2816, repeats=6, heads=16, kv_heads=4, batch_size=64, learning_rate=7e-4)
