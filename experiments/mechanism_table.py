"""The README's tables of mechanisms, read from the code: engines with their forms, selections, layers.

    python -m experiments.mechanism_table [--write]

Prints the tables; --write puts them into README.md between their markers.
"""

import contextlib
import importlib
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

FLAGS = flags.FlagValues()
WRITE = flags.DEFINE_bool("write", False, "write the tables into README.md", flag_values=FLAGS)

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


def selections() -> dict[str, Callable[..., Any]]:
    """The functions of `sparse` that attend to what they, a mask or a list select."""
    found = {name: getattr(sparse, name) for name in sparse.__all__}
    parts = ("cached_", "init_", "append_", "prefill_")
    return {
        name: f
        for name, f in found.items()
        if inspect.isfunction(f)
        and f not in (*SOFTMAX, sparse.merge, sparse.with_sinks, sparse.nsa_compress, sparse.indexer_loss)
        and (not name.startswith(parts) or name in ("cached_cluster_kv", "cached_retro"))
        and not name.endswith("_prefill")
    }


def selection_rows() -> Iterator[tuple[str, ...]]:
    for name, f in sorted(selections().items()):
        module = inspect.getmodule(f)
        assert module is not None
        name_of_module = module.__name__.rpartition(".")[2]
        records = _records(name_of_module)
        first = next(iter(inspect.signature(f).parameters.values()))
        decodes = "B 1" in getattr(first.annotation, "dim_str", "")
        by_design = "not strictly causal" in " ".join(f"{module.__doc__}{f.__doc__}".split())
        causal = {record.causal for record in records} or {not by_design}
        trainable = not decodes and all(record.trainable for record in records)
        what = (module.__doc__ or "").partition("\n")[0].rstrip(".")
        yield (
            f"`{name}`",
            re.sub(r" \(.*arXiv.*", "", what),
            "yes" if trainable else "no",
            "decoding" if decodes else "either" if len(causal) == 2 else "yes" if True in causal else "no",
            _cache(f, module),
            str(_tests(name_of_module, records)),
            papers(inspect.getsource(module)),
        )


def _records(module: str) -> list[Any]:
    """Those of a module in the suite that all mechanisms go through."""
    try:
        return importlib.import_module(f"tests.sparse.records.{RECORDS_OF.get(module, module)}").RECORDS
    except ModuleNotFoundError:
        return []


RECORDS_OF = {"masked_attention": "patterns"}
TESTS_OF = {"retro": "cluster_kv"}


def _cache(f: Callable[..., Any], module: Any) -> str:
    """What remembers the tokens while it decodes."""
    given = inspect.signature(f).parameters.get("cache")
    if given is not None:
        return f"`{given.annotation.__name__}`"
    with contextlib.suppress(ModuleNotFoundError):
        module = importlib.import_module(f"{module.__name__}_cache")
    own = [name for name, x in vars(module).items() if name.endswith("Cache") and x.__module__ == module.__name__]
    return ", ".join(f"`{name}`" for name in own)


def _tests(module: str, records: list[Any]) -> int:
    """Test functions of its own, and those of the suite that its records go through."""
    text = "".join(
        path.read_text()
        for path in (README.parent / "tests" / "sparse").glob(f"test_{TESTS_OF.get(module, module)}*.py")
    )
    suite = (README.parent / "tests" / "sparse" / "test_mechanisms.py").read_text()
    return text.count("\ndef test_") + len(records) * suite.count("\ndef test_")


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
    given = [inspect.signature(base.__init__).parameters.get("heads") for base in layer.__mro__]
    heads = next((x for x in given if x is not None), None)
    return heads is not None and heads.default is inspect.Parameter.empty


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> dict[str, str]:
    """By the name of their markers in the README."""
    return {
        "engines": table(("function", "forms", "state", "papers"), engine_rows()),
        "selections": table(
            ("function", "what", "trainable", "strictly causal", "cache", "tests", "papers"), selection_rows()
        ),
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
    FLAGS(sys.argv)
    if WRITE.value:
        README.write_text(inserted(README.read_text()))
        print(f"wrote the tables of {README.name}")
        return
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main()
