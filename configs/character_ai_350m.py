"""350M parameters after what Character.AI says of its serving: a small cache in every way that it names, at once.

    python -m experiments.train --config=configs/character_ai_350m.py --workdir=runs/character_ai

"Optimizing AI Inference at Character.AI" (2024) has one key head in every layer, a window of 1024 in five layers of
six, keys and values shared by neighbours and, by all global layers, those of the first, and int8. It gives no layer
map, no sizes and nothing of rotations: those here are ours. Four times five local layers, the second reading the keys
of the first, the fourth and fifth those of the third, and a global one. Of 24 layers 9 have a cache.

At 32,768 tokens it takes 10.5 MiB; with a cache of its own in bfloat16 for each of its 8 heads and every layer, all of
them global, the same model would take 3 GiB. Here int8 rounds what a state holds; training does not see it.
"""

from ml_collections import ConfigDict

from configs.hybrid_125m import hybrid

LOCAL, GLOBAL = ("local", "near", "local", "near", "near"), {"kind": "attention", "heads": 8, "kv_heads": 1}


def get_config() -> ConfigDict:
    config = hybrid(dim=1024, mlp_dim=4096, repeats=3, heads=8, kv_heads=1, batch_size=32, learning_rate=8e-4)
    everywhere = GLOBAL | {"head_dim": 128, "cache_dtype": "int8"}
    window = everywhere | {"window": 1024}
    config.model.before = (*LOCAL, "global")
    config.model.pattern = (*LOCAL, "far")
    config.model.mixers = {
        "local": window,
        "near": window | {"kv_from": "local"},
        "global": everywhere,
        "far": everywhere | {"kv_from": "global"},
    }
    return config
