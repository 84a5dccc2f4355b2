"""The pickle of a state dict, read without running it.

A pickle is a program: it may name any function and call it. Here its opcodes are interpreted, only those that
`torch.save` writes for a dictionary of tensors, and what it names stays a name: nothing of the file is ever called.
"""

import dataclasses
import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from effattn_jax import checks

DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""Storages of torch, and their elements as safetensors spells them."""


@dataclasses.dataclass(frozen=True)
class Global:
    """What a pickle names."""

    module: str
    name: str


DICTIONARY, TENSOR = Global("collections", "OrderedDict"), Global("torch._utils", "_rebuild_tensor_v2")


class Storage(NamedTuple):
    """Numbers in a row: entry data/`key` of the archive."""

    dtype: str
    key: str
    size: int


class View(NamedTuple):
    """A tensor: element (i, j, ...) is number offset + i * strides[0] + j * strides[1] + ... of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Refused(Exception):
    """What the pickle asked for."""


def state_dict(pickle: bytes, source: str) -> dict[str, View]:
    """The tensors that a pickle describes, by name.

    Args:
      source: the file, for messages.

    Raises:
      ValueError: the pickle names, calls or holds anything but tensors, or is damaged.
    """
    try:
        found = _Machine().run(pickle)
        if not isinstance(found, dict):
            _refuse(f"{_describe(found)} on its own")
        for name, value in found.items():
            if not isinstance(value, View):
                _refuse(f"{_describe(value)} under {name!r}")
    except Refused as error:
        checks.fail(source, str(error), "a pickle of nothing but a dictionary of tensors; it was not run")
    except (ValueError, LookupError) as error:  # of pickletools; an empty stack
        checks.fail(source, f"{type(error).__name__}: {str(error)[:200]}", "an undamaged pickle")
    return found


class _Machine:
    """A stack, stacks below a mark, and a memory."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(pickle)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in OPCODES:
                _refuse(f"opcode {opcode.name} {'' if argument is None else repr(argument)[:80]}".rstrip())
            OPCODES[opcode.name](self, argument)
        raise ValueError("no end")

    def marked(self) -> list[Any]:
        """What was pushed since the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def last(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("less on the stack than is taken from it")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def push_tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(items))

    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            _refuse(f"the name {_describe(name)} of {_describe(module)}")
        named = Global(module, name)
        if named not in (DICTIONARY, TENSOR) and not (module == "torch" and name in DTYPES):
            _refuse(_describe(named))
        self.stack.append(named)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            _refuse(f"an item of {_describe(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                _refuse(f"the key {_describe(key)}")
            target[key] = value

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == DICTIONARY and arguments == ():
            self.stack.append({})
        elif function == TENSOR and isinstance(arguments, tuple) and 6 <= len(arguments) <= 7:
            self.stack.append(_view(*arguments))
        else:
            _refuse(f"a call of {_describe(function)} with {_describe(arguments)}")

    def build(self) -> None:
        """torch keeps versions of modules as `_metadata` of the dictionary: of no consequence."""
        state, target = self.stack.pop(), self.stack[-1]
        if not (isinstance(target, dict) and isinstance(state, dict) and set(state) <= {"_metadata"}):
            _refuse(f"attributes of {_describe(target)}")

    def push_storage(self) -> None:
        match self.stack.pop():
            case ("storage", Global(module="torch", name=kind), str(key), str(), int(size)) if kind in DTYPES:
                self.stack.append(Storage(DTYPES[kind], key, _natural(size)))
            case other:
                _refuse(f"the persistent id {_describe(other)}")


def _view(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, extra: Any = None
) -> View:
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        _refuse("a tensor without a storage, a shape and strides")
    if len(shape) != len(strides):
        _refuse(f"a tensor of shape {_describe(shape)} with strides {_describe(strides)}")
    if hooks or extra:
        _refuse("a tensor with hooks or attributes")
    return View(storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides)))


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        _refuse(f"a size of {_describe(value)}")
    return int(value)


def _refuse(what: str) -> NoReturn:
    raise Refused(what)


def _describe(value: Any) -> str:
    """Never the whole of it: containers may be nested without end."""
    if isinstance(value, Global):
        return f"{value.module}.{value.name}"[:80]
    if isinstance(value, int | float | str | None):
        return repr(value)[:80]
    return f"a {type(value).__name__.lower()}"


def _push(value: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(value(argument))


def _ignore(machine: _Machine, argument: Any) -> None:
    pass


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


def _get(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.memo[argument])


def _as_it_is(argument: Any) -> Any:
    return argument


OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _ignore,
    "FRAME": _ignore,
    "MARK": lambda machine, _: machine.mark(),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push(_as_it_is)),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _push(_as_it_is)),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "TUPLE": lambda machine, _: machine.push_tuple(machine.marked()),
    "TUPLE1": lambda machine, _: machine.push_tuple(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.push_tuple(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.push_tuple(machine.last(3)),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "GLOBAL": lambda machine, names: machine.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_global(*machine.last(2)),
    "BINPERSID": lambda machine, _: machine.push_storage(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
