"""A `.pth` file written by hand: the opcodes of a pickle, and a zip archive of stored entries around it."""

import math
import struct
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}
FALSE, NONE, CALL, PERSISTENT_ID = b"\x89", b"N", b"R", b"Q"
ROOT = "archive"


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def name(module, name):
    return f"c{module}\n{name}\n".encode()


def call(function, *arguments):
    return function + tuple_of(*arguments) + CALL


def dictionary(items):
    return call(name("collections", "OrderedDict")) + b"(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def pickle(value):
    return b"\x80\x02" + value + b"."


def storage(kind, key, size):
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(size)) + PERSISTENT_ID


HOOKS = call(name("collections", "OrderedDict"))


def tensor(storage, offset, shape, strides, *, hooks=HOOKS):
    sizes = (tuple_of(*map(number, shape)), tuple_of(*map(number, strides)))
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, number(offset), *sizes, FALSE, hooks)


def strides(shape):
    """Of rows one after the other, in numbers."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def archive(path, data_pkl, data=(), *, compressed=(), root=ROOT, **others):
    """`data` are arrays or bytes, under the keys 0, 1, ...; `others` are further entries."""
    with zipfile.ZipFile(path, "w") as file:
        for key, content in {"data.pkl": data_pkl, **others, **{f"data/{i}": x for i, x in enumerate(data)}}.items():
            kind = zipfile.ZIP_DEFLATED if key in compressed else zipfile.ZIP_STORED
            file.writestr(f"{root}/{key}", content if isinstance(content, bytes) else content.tobytes(), kind)
    return path


def write(path, arrays, **options):
    """A state dict of arrays."""
    items = {
        key: tensor(storage(STORAGES[x.dtype], str(i), x.size), 0, x.shape, strides(x.shape))
        for i, (key, x) in enumerate(arrays.items())
    }
    return archive(path, pickle(dictionary(items)), arrays.values(), **options)
