"""A checkpoint less what is around the weights of its language model: other modalities, a quantisation."""

from effattn_jax import checks
from effattn_jax.pretrained.family import Config
from effattn_jax.pretrained.multimodal import is_multimodal, text_config, text_name
from effattn_jax.pretrained.mxfp4 import Dequantised, is_mxfp4, unquantised
from effattn_jax.pretrained.tensors import Renamed, Tensors


def language_config(config: Config) -> Config:
    """The config of the language model with weights in floats.

    Raises:
      ValueError: a quantisation that is not supported.
    """
    config = text_config(config) if is_multimodal(config) else config
    given = config.get("quantization_config")
    if given and not is_mxfp4(config):
        checks.fail("quantization_config", repr(given.get("quant_method")), "none, or mxfp4")
    return unquantised(config) if given else config


def language_model(config: Config, reader: Tensors) -> tuple[Config, Tensors]:
    """`language_config`, and the tensors that belong to it.

    Raises:
      ValueError: a quantisation that is not supported.
    """
    if is_multimodal(config):
        config, reader = text_config(config), Renamed(reader, text_name)
    return language_config(config), Dequantised(reader) if is_mxfp4(config) else reader
