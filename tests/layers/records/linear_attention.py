from effattn_jax.layers import FastWeight, LightningAttention, LinearAttention, MultiScaleRetention, Performer
from tests.layers.records.record import Record

HEADS = {"heads": 4}
WIDE = {"heads": 2, "key_dim": 4, "value_dim": 6}


def _linear(slow=True, **options):
    return Record(LinearAttention, WIDE | options, slow=slow)


RECORDS = {
    "linear_attention": Record(LinearAttention, HEADS, slow=False),
    "linear_attention_cosformer": _linear(feature_map="cosformer", max_length=200),
    "linear_attention_taylor": _linear(feature_map="taylor", kv_heads=1),
    "linear_attention_hedgehog": _linear(feature_map="hedgehog", feature_dim=3, output_norm=True),
    "linear_attention_t2r": _linear(feature_map="t2r", tie_feature_map=True, normalise=False, scale=None),
    # enough features that none of the tokens has only zeros
    "linear_attention_dpfp": _linear(feature_map="dpfp", nu=6, heads=1, kv_heads=1),
    "linear_attention_rebased": _linear(feature_map="rebased"),
    "linear_attention_product": _linear(feature_map="elementwise_product", normalise=False, output_norm=True),
    "linear_attention_shared_product": _linear(
        feature_map="elementwise_product", share_feature_map=True, normalise=False, scale=None
    ),
    "performer": Record(Performer, HEADS | {"features": 6}),
    # of the sizes with no kink of relu between the ends of the differences
    "performer_relu": Record(Performer, HEADS | {"kernel": "relu", "features": 24, "scaling": "sqrt"}, slow=True),
    "fast_weight": Record(FastWeight, HEADS | {"nu": 2}),
    "fast_weight_favor": Record(FastWeight, HEADS | {"feature_map": "favor", "features": 6}, slow=True),
    "fast_weight_sum": Record(FastWeight, HEADS | {"feature_map": "elu", "update": "sum"}, slow=True),
    "retention": Record(MultiScaleRetention, {"heads": 2}),
    "retention_rope": Record(
        MultiScaleRetention, WIDE | {"rotation": "rope", "norm_affine": True, "norm_eps": 1e-5}, slow=True
    ),
    "lightning": Record(LightningAttention, {"heads": 4, "layer_index": 1, "layer_count": 3}),
    "lightning_rope": Record(
        LightningAttention, {"heads": 3, "head_dim": 4, "layer_slopes": False, "rope_theta": 100.0}, slow=True
    ),
}
