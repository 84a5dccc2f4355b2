"""What a model is made of, what it remembers and what it costs, by the length of the context. Nothing is allocated.

    python -m experiments.describe --config=configs/hybrid_350m.py
    python -m experiments.describe --preset=mistral-7b-v0.1 --preset=jamba-v0.1 --output=memory.png
    python -m experiments.describe --checkpoint=<directory> --checkpoint=<author>/<name>

Of a checkpoint only config.json is read. Several may be named; --output draws what each remembers of a sequence against
its length. --presets lists the published models that are known by name.
"""

from collections.abc import Collection, Mapping

from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from effattn_jax import checks
from effattn_jax.models.blueprint import blueprint
from effattn_jax.models.description import AtContext, Description, describe
from effattn_jax.models.sizes import format_bytes
from effattn_jax.pretrained.description import describe_config, published_config
from effattn_jax.pretrained.presets import names, preset
from effattn_jax.training.data import load_tokenizer
from effattn_jax.training.setup import model_maker
from experiments import cli, model_flags

FLAGS = flags.FlagValues()
PRESETS = flags.DEFINE_multi_string(
    "preset", [], "a published model by name; may be given several times", flag_values=FLAGS
)
LIST = flags.DEFINE_bool("presets", False, "list their names", flag_values=FLAGS)
CONTEXTS = flags.DEFINE_list(
    "contexts", [str(1 << n) for n in range(10, 21, 2)], "lengths of the context in the table", flag_values=FLAGS
)
OUTPUT = flags.DEFINE_string("output", None, "the figure, a png, pdf or svg file; default: none", flag_values=FLAGS)

CURVE = [1 << n for n in range(10, 21)]


def of_config(config: ConfigDict, workdir: str) -> None:
    del workdir
    plan = blueprint(model_maker(config, load_tokenizer(config.data.tokenizer).vocab_size))
    report({cli.config_name(): describe(plan, contexts())} | published())


def of_others() -> None:
    if LIST.value:
        print("\n".join(names()))
        return
    found = published()
    if not found:
        checks.fail("flags", "no --config, --checkpoint or --preset", "one of them (--help shows all flags)")
    report(found)


def published() -> dict[str, Description]:
    configs = {name: preset(name) for name in PRESETS.value}
    configs |= {name: published_config(name) for name in model_flags.CHECKPOINTS.value}
    return {name: describe_config(config, contexts()) for name, config in configs.items()}


def contexts() -> list[int]:
    """Those of the table, and those of the curve where one is drawn."""
    wanted = table() | set(CURVE if OUTPUT.value else ())
    return sorted(wanted)


def table() -> set[int]:
    try:
        found = {int(word) for word in CONTEXTS.value}
    except ValueError:
        checks.fail("--contexts", ",".join(CONTEXTS.value), "integers with commas between them")
    if not found or min(found) < 1:
        checks.fail("--contexts", ",".join(CONTEXTS.value), "at least one length, of at least one token")
    return found


def report(found: Mapping[str, Description]) -> None:
    for name, description in found.items():
        print(f"\n{name}\n{words(description, table())}")
    if OUTPUT.value:
        draw(OUTPUT.value, found)
        print(f"\nwritten: {OUTPUT.value}")


def words(of: Description, contexts: Collection[int]) -> str:
    """The description in lines, with those of its contexts."""
    count = max(len(f"{times}") for _, times in of.layers)
    layers = [f"{times:>{count}} x {kind}" for kind, times in of.layers]
    lines = [
        *(f"  {'layers' if not i else '':<12}{line}" for i, line in enumerate(layers)),
        f"  {'parameters':<12}{of.parameters:,}; {of.embedding_parameters:,} in embedding and head",
        f"  {'active':<12}{of.active_parameters:,}; without idle experts, and an embedding that is not the head",
        f"  {'dtype':<12}{of.dtype}",
        "",
        f"  {'context':>12}{'state':>12}{'cache':>12}{'FLOPs: next token':>20}{'token of a prompt':>20}",
    ]
    return "\n".join(lines + [row(at) for at in of.contexts if at.context in contexts])


def row(at: AtContext) -> str:
    memory = f"{format_bytes(at.state_bytes):>12}{format_bytes(at.cache_bytes):>12}"
    return f"  {at.context:>12,}{memory}{format_flops(at.decode_flops):>20}{format_flops(at.prefill_flops):>20}"


def format_flops(flops: float) -> str:
    for unit in ("", "k", "M", "G"):
        if flops < 1000:
            return f"{flops:.3g} {unit}".rstrip()
        flops /= 1000
    return f"{flops:.3g} T" if flops < 1000 else f"{flops:,.0f} T"


def draw(path: str, found: Mapping[str, Description]) -> None:
    """What each remembers of one sequence against its length."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, description in found.items():
        lengths, sizes = zip(*((at.context, at.bytes) for at in description.contexts), strict=True)
        axes.plot(lengths, sizes, marker="o", markersize=3, linewidth=1.5, label=f"{name} ({description.dtype})")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda y, _: format_bytes(y))
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("state and cache of a sequence")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(of_config, __doc__, without_config=of_others, own_flags=(FLAGS, model_flags.FLAGS))
