"""Which Pallas kernels a call can run on."""

import importlib.util
from typing import Any

import jax

from effattn_jax.dispatch import platform

ROWS = 64  # queries that a warpgroup of the attention kernel has


def implementations_here(form: str) -> tuple[str, ...]:
    """What `implementation=None` tries for this form, in this order.

    Kernels that never ran on their chip are not among them; nor are any where XLA would have to partition the call,
    which it cannot: on several devices outside of `shard_map`; nor the step of one token, which XLA makes as fast.
    """
    return ("mosaic_gpu", "xla") if form == "chunkwise" and platform() == "gpu" and _is_alone() else ("xla",)


def attention_here(length: int) -> tuple[str, ...]:
    """The same for softmax attention of so many queries: our kernel takes what cuDNN refuses (sinks, documents, a cap,
    a log-sum-exp), but not the few queries of a decoding step, which it would fill up to a tile."""
    many = length >= ROWS and platform() == "gpu" and _is_alone()
    return ("cudnn", "mosaic_gpu", "xla") if many else ("cudnn", "xla")


def _is_alone() -> bool:
    return jax.device_count() == 1 or _is_manual()


def _is_manual() -> bool:
    """Whether this is inside a `shard_map` over all axes of the mesh."""
    axes = jax.sharding.get_abstract_mesh().axis_types
    return bool(axes) and all(axis == jax.sharding.AxisType.Manual for axis in axes)


def takes_step(form: str, q: jax.Array, v: jax.Array) -> bool:
    """Whether the kernel for one token serves this call, else the chunkwise one.

    Raises:
      NotImplementedError: neither does.
    """
    length = q.shape[1]
    if 0 in q.shape or 0 in v.shape:
        raise NotImplementedError(f"q {q.shape} or v {v.shape} is empty")
    if form not in ("chunkwise", "recurrent") or (form == "recurrent" and length != 1):
        raise NotImplementedError(f"form {form!r}; needs 'chunkwise', or one token")
    return form == "recurrent"


def refuse_varying(*arrays: Any) -> None:
    """Mosaic GPU does not follow which axes of the mesh a value varies over.

    Raises:
      NotImplementedError: inside a `shard_map` that checks it.
    """
    if axes := _varying(arrays):
        raise NotImplementedError(f"values vary over the mesh axes {axes}; needs shard_map(check_vma=False)")


def _varying(arrays: tuple[Any, ...]) -> list[str]:
    """The manual axes of the mesh that values are known to vary over."""
    axes = {axis for x in arrays if x is not None for axis in jax.typeof(x).manual_axis_type.varying}
    return sorted(map(str, axes))


def hopper_or_interpreter() -> Any:
    """Whether a Mosaic GPU kernel is interpreted: on a CPU, where only a call that names the kernel asks for it.

    Raises:
      NotImplementedError: a GPU that is not of the Hopper generation, or a TPU.
    """
    here = platform()
    if here == "cpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams()
    if here != "gpu":
        raise NotImplementedError(f"a kernel for GPUs; this is a {here}")
    capability = getattr(jax.local_devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        raise NotImplementedError(f"needs a Hopper GPU (compute capability 9.0); this one has {capability}")
    return False


def tpu_or_interpreter(*arrays: Any) -> Any:
    """The same for a Mosaic TPU kernel of these arrays.

    On a CPU it becomes ordinary operations, which take part in `vmap` and `checkpoint`; but those do not follow which
    axes of the mesh a value varies over, so that there the TPU's memories are simulated, which takes ten times as long.

    Raises:
      NotImplementedError: a GPU.
    """
    here = platform()
    if here == "cpu":
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.InterpretParams() if _varying(arrays) else True
    if here != "tpu":
        raise NotImplementedError(f"a kernel for TPUs; this is a {here}")
    return False


def refuse_without_triton() -> None:
    """Triton's kernels run on the GPUs of NVIDIA and AMD; `jax_triton` calls them, which is an extra.

    Raises:
      NotImplementedError: no GPU, or one of the packages is missing.
    """
    here = platform()
    if here != "gpu":
        raise NotImplementedError(f"a kernel for GPUs; this is a {here}")
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotImplementedError(f"no {', '.join(missing)} here; needs `pip install 'effattn_jax[triton]'`")
