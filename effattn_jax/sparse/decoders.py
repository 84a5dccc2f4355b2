"""Decoders by name."""

from collections.abc import Mapping
from typing import Any

from effattn_jax import checks
from effattn_jax.sparse.cluster_decoders import ClusterKV, Retro
from effattn_jax.sparse.decoder import Decoder, Dense
from effattn_jax.sparse.kept_decoders import H2O, SnapKV, Streaming
from effattn_jax.sparse.options import check_options
from effattn_jax.sparse.paged_decoders import DoubleSparsity, Quest

DECODERS: dict[str, type[Decoder]] = {
    "quest": Quest,
    "double_sparsity": DoubleSparsity,
    "h2o": H2O,
    "snapkv": SnapKV,
    "cluster_kv": ClusterKV,
    "retro": Retro,
    "streaming": Streaming,
}


def decoder_of(decode: str | None, options: Mapping[str, Any]) -> Decoder:
    """Of a name; None reads everything.

    Raises:
      ValueError: a name or an option that does not exist, or an option that is missing.
    """
    if decode is None:
        if options:
            checks.fail("decode_options", sorted(options), "none without a mechanism")
        return Dense()
    if decode not in DECODERS:
        checks.fail("decode", repr(decode), f"None or one of {', '.join(DECODERS)}")
    check_options("decode_options", options, DECODERS[decode])
    return DECODERS[decode](**options)
