"""Triton's interpreter on the arrays of JAX: the bodies of the kernels run on a CPU, program after program.

Import it before `triton`, which reads TRITON_INTERPRET once. The interpreter expects tensors of PyTorch; `Tensor` is as
much of one as it asks for, around an array of numpy.
"""

import os
import threading

os.environ["TRITON_INTERPRET"] = "1"

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def dot_of_bfloat16(self, a, b, *rest):
    """The interpreter keeps bfloat16 as whole numbers of 16 bits, and multiplies those."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return dot(self, a, b, *rest)


def cast_to_nearest(self, x, dtype):
    """The interpreter rounds to bfloat16 towards zero; a GPU rounds to the nearest."""
    if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        return TensorHandle(x.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
    return cast(self, x, dtype)


InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot_of_bfloat16, cast_to_nearest


class Tensor:
    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def _itself(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = _itself

    def _nothing(self, *_, **__):
        return None

    set_ = copy_ = storage_offset = size = stride = _nothing


one_at_a_time = threading.Lock()  # the interpreter keeps the number of its program in one global


def launch(kernel, programs, out, arrays, size, **constants):
    """In the place of `pallas_kernels.triton.launch.launch`. Outputs start as NaN: a kernel fills every element."""

    def run(*arrays):
        results = [np.full(x.shape, np.nan, x.dtype) for x in out]
        tensors = [Tensor(np.ascontiguousarray(x)) for x in (*arrays, *results)]
        with one_at_a_time:
            kernel[(programs, 1, 1)](*tensors, **constants)
        return results

    return jax.pure_callback(run, list(out), *arrays)
