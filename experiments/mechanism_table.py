"""The README's tables of mechanisms, read from the code: engines with their forms, layers with their state.

    python -m experiments.mechanism_table [--write]

Prints the tables; --write puts them into README.md between their markers.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

from effattn_jax import linear, sparse
from effattn_jax.layers import MIXERS

WRITE = flags.DEFINE_bool("write", False, "write the tables into README.md")

README = Path(__file__).parents[1] / "README.md"
DIM, LENGTH = 1024, 4096
HEADS = 8  # of the layers that have no number of their own


def papers(text: str) -> str:
    """Links to the arXiv numbers of a docstring, in its order."""
    found = dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", text))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in found)


def engines() -> dict[str, Callable[..., Any]]:
    """The functions of `linear` that have forms, and those of softmax attention."""
    found = {name: getattr(linear, name) for name in linear.__all__}
    found = {name: f for name, f in found.items() if callable(f) and "form" in inspect.signature(f).parameters}
    return found | {f.__name__: f for f in SOFTMAX}


SOFTMAX = (sparse.attention, sparse.forgetting_attention, sparse.path_attention)


def forms(engine: Callable[..., Any]) -> str:
    """Of an engine; a function without forms of its own has those of the engine it calls."""
    if engine in SOFTMAX:
        return "online softmax"
    module = vars(inspect.getmodule(engine))
    if "FORMS" in module:
        return ", ".join(module["FORMS"])
    called = [name for name, f in engines().items() if f is not engine and f in module.values()]
    return ", ".join(f"those of `{name}`" for name in called)


def state_shape(engine: Callable[..., Any]) -> str:
    """From the annotation of what the engine returns: (out, state)."""
    if engine in SOFTMAX:
        return "keys and values"
    _, state = inspect.signature(engine).return_annotation.__args__
    return _shape(state)


def _shape(annotation: Any) -> str:
    if hasattr(annotation, "dim_str"):
        return "[" + ", ".join(annotation.dim_str.split()) + "]"
    if hasattr(annotation, "_fields"):
        return ", ".join(annotation._fields)
    return getattr(annotation, "__name__", str(annotation))


def engine_rows() -> Iterator[tuple[str, ...]]:
    for name, engine in sorted(engines().items()):
        text = (inspect.getmodule(engine).__doc__ or "") + (engine.__doc__ or "")
        yield f"`{name}`", forms(engine), state_shape(engine), papers(text)


def layer_rows() -> Iterator[tuple[str, ...]]:
    functions = {id(f): name for name, f in engines().items()}
    for name, layer in sorted(MIXERS.items()):
        text = (inspect.getmodule(layer).__doc__ or "") + (layer.__doc__ or "")
        yield f"`{name}`", layer.__name__, ", ".join(_engines_of(layer, functions)), _state(layer), papers(text)


def _engines_of(layer: type, functions: dict[int, str]) -> list[str]:
    """The engines that the layer's module imports, or that layers do from which it is made."""
    modules: dict[str, Any] = {}

    def visit(module: Any) -> None:
        if module.__name__ in modules or not module.__name__.startswith("effattn_jax.layers."):
            return
        modules[module.__name__] = module
        for x in vars(module).values():
            if inspect.isclass(x):
                visit(inspect.getmodule(x))

    for base in layer.__mro__[:-1]:
        visit(inspect.getmodule(base))
    used = {functions[id(x)] for module in modules.values() for x in vars(module).values() if id(x) in functions}
    return [f"`{name}`" for name in sorted(used)]


def _state(layer: Any) -> str:
    """Numbers that a layer of the default size remembers for a sequence of LENGTH tokens, and whether that grows."""
    options = {"heads": HEADS} if _needs_heads(layer) else {}

    def size(length: int) -> int:
        def start() -> Any:
            return layer(DIM, **options, rngs=nnx.Rngs(0)).init_state(1, length)

        return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.eval_shape(start)))

    fixed, more = size(LENGTH), size(2 * LENGTH)
    return f"{fixed:,}" if fixed == more else f"{fixed:,} for {LENGTH:,} tokens, {more:,} for {2 * LENGTH:,}"


def _needs_heads(layer: Any) -> bool:
    heads = inspect.signature(layer.__init__).parameters.get("heads")
    return heads is not None and heads.default is inspect.Parameter.empty


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> dict[str, str]:
    """By the name of their markers in the README."""
    return {
        "engines": table(("function", "forms", "state", "papers"), engine_rows()),
        "layers": table(
            ("mixer", "class", "engine", f"numbers remembered (dim {DIM}, defaults)", "papers"), layer_rows()
        ),
    }


def inserted(text: str) -> str:
    """The README with its tables made anew."""
    for name, new in tables().items():
        begin, end = f"<!-- {name}: python -m experiments.mechanism_table --write -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"README.md: got no markers of {name!r}; needs {begin} and {end}")
        text = f"{before}{begin}\n{new}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    flags.FLAGS(sys.argv)
    if WRITE.value:
        README.write_text(inserted(README.read_text()))
        print(f"wrote the tables of {README.name}")
        return
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main()
