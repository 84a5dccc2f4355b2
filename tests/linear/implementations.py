"""The kernels of the engines, as engines of their own: the same checks, by `implementation=`, interpreted on a CPU."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np

from tests.linear.records import scalar_decay, vector_decay
from tests.linear.suite import Sizes
from tests.ratio import BFLOAT16_GATE, BFLOAT16_GRAD, BFLOAT16_OUT

LARGEST = 256  # K and V of a kernel


def _form(form):
    return rf"form '{form}'; needs 'chunkwise'", lambda arguments: arguments | {"form": form}


def _dtype(dtype):
    def change(arguments):
        return arguments | {name: arguments[name].astype(dtype) for name in "qkv"}

    return rf"{np.dtype(dtype).name}.*; needs", change


def _dim(dim):
    def change(arguments):
        v, state = arguments["v"], arguments["initial_state"]
        wide = np.zeros((*v.shape[:3], dim + 1), v.dtype)
        return arguments | {"v": wide, "initial_state": np.zeros((*state.shape[:3], dim + 1), state.dtype)}

    return rf"V = {dim + 1}; needs .*{dim}", change


def _empty(arguments):
    static = ("bonus", "initial_state")
    return {name: x if name in static else x[:, :0] for name, x in arguments.items()}


def _implemented(engine, implementation, dtypes, **fields):
    """What kernels have: the chunkwise form, of some tokens, K and V up to LARGEST; not these dtypes."""
    return dataclasses.replace(
        engine,
        name=f"{engine.name}, {implementation}",
        function=partial(engine.function, implementation=implementation),
        chunkwise=None,
        map=None,
        forms=("chunkwise",),
        slow_forms=(),
        groups=((1, 1, 2), (2, 1, 1), (1, 2, 1)),
        of=engine,
        takes=lambda sizes: sizes.length > 0 and max(sizes.key_dim, sizes.value_dim) <= LARGEST,
        longest=4096,
        refuses={
            **{form: _form(form) for form in ("recurrent", "parallel", "associative")},
            **{np.dtype(dtype).name: _dtype(dtype) for dtype in dtypes},
            "wide heads": _dim(LARGEST),
            "no tokens": ("is empty", _empty),
        },
        **fields,
    )


def _mosaic_gpu(engine, **fields):
    """Every load of a simulated thread is a call of Python: a row of 196 tokens takes seconds, so it is of one head."""
    return _implemented(
        engine,
        "mosaic_gpu",
        [np.float32],
        main=Sizes(key_dim=64, value_dim=64, heads=(1, 1, 1)),
        dtype=jnp.bfloat16,
        limits=(BFLOAT16_OUT, BFLOAT16_GRAD, BFLOAT16_GATE),
        is_interpreted=True,
        **fields,
    )


def _mosaic_tpu(engine):
    return _implemented(engine, "mosaic_tpu", [np.float16], main=Sizes(key_dim=64, value_dim=64, heads=(2, 2, 2)))


_ENGINES = (scalar_decay.RECORDS[0], *vector_decay.RECORDS[:2])  # gates per token, of a head or of channels; a bonus
RECORDS = [
    # of one token with a decay of 1e-6 nothing else is left: q . dq and k . dk of its own pair, in float32, cancel
    _mosaic_gpu(_ENGINES[0], gate_floor=1e-5),
    *map(_mosaic_gpu, _ENGINES[1:]),
    *map(_mosaic_tpu, _ENGINES),
]
