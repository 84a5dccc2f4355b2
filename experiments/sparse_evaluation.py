"""What a model loses when a mechanism reads its rows: bits per byte of text, and needles found."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from effattn_jax.models import LanguageModel
from effattn_jax.models.loss import token_losses
from effattn_jax.sparse.decoders import DECODERS, Dense
from effattn_jax.sparse.prefills import PREFILLS
from effattn_jax.typing import Array, Float, Int, Tokens
from experiments.sparse_count import recorder, share_of_decoder, share_of_lists, share_of_prefill
from experiments.sparse_methods import RANDOM, Sizes, decode_options, prefill_options, read_randomly, side_share
from experiments.sparse_needles import Task, draw_rows
from experiments.sparse_training import Trained, text

DENSE = "dense"
PREFILL, DECODE = "prefill", "decode"


class Quality(NamedTuple):
    read: float  # of the causal pairs of a query and a key, in all layers and heads
    side: float  # what was read to choose, in keys, in addition; of decoding steps
    bits_per_byte: float  # of text: of all bytes at prefill, of the decoded ones at decoding
    recall: float  # of needles: the answer is the most probable byte


class Data(NamedTuple):
    text: Int[np.ndarray, "R T"]
    needles: Int[np.ndarray, "R T"]  # a row ends with the answer


class Case(NamedTuple):
    """A model and what it is tested on."""

    trained: Trained
    data: Data
    sizes: Sizes
    decoded: int  # bytes at the end of a row
    batch: int
    kept: tuple[np.ndarray, np.ndarray]  # queries and keys of the dense model, a row a layer

    @property
    def prompt(self) -> int:
        return self.sizes.keys - self.decoded


def held_out(config: ConfigDict) -> Data:
    """Rows of text, evenly from all of it, and rows with needles."""
    test, source = config.test, text(config, "validation")
    starts = np.linspace(0, len(source) - test.length - 1, test.text_rows).astype(int)
    plain = np.stack([source[start : start + test.length + 1] for start in starts])
    rows = draw_rows(np.random.default_rng(1), source, test.needle_rows, Task(test.length + 1, test.needles))
    return Data(plain, rows.bytes)


def case_of(config: ConfigDict, trained: Trained, data: Data) -> Case:
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    model = trained.model.with_attention(prefill=recorder(kept))
    hidden, _ = jax.jit(lambda tokens: model.hidden(tokens))(data.needles[:2, :-1])
    jax.block_until_ready(hidden)
    jax.effects_barrier()
    q, k = (np.concatenate(x) for x in zip(*kept, strict=True))
    sizes = Sizes(config.test.length, config.sweep.block, config.sweep.page)
    return Case(trained, data, sizes, config.test.decoded, config.test.batch, (q, k))


def settings(shares: tuple[float, ...], sizes: Sizes) -> list[tuple[str, str, float, dict[str, Any]]]:
    """Phase, mechanism, budget and options: dense reading, then every mechanism at every budget."""
    every: list[tuple[str, str, float, dict[str, Any]]] = [(PREFILL, DENSE, 1.0, {})]
    every.append((DECODE, DENSE, 1.0, {}))
    for phase, options in ((PREFILL, prefill_options), (DECODE, decode_options)):
        for method in options(1.0, sizes):
            every += [(phase, method, share, options(share, sizes)[method]) for share in shares]
    return every


def quality(case: Case, phase: str, method: str, options: Mapping[str, Any]) -> Quality:
    return (at_prefill if phase == PREFILL else at_decoding)(case, method, options)


def at_prefill(case: Case, method: str, options: Mapping[str, Any]) -> Quality:
    """Rows are read as a prompt; the answer to a question at the end of one is what follows."""
    reads: list[Array] = []
    keep = lambda read: jax.debug.callback(reads.append, read)  # noqa: E731
    sparse: dict[str, Any]
    if method == DENSE:
        sparse = {}
        reads.append(jnp.ones(()))
    elif method == RANDOM:
        sparse = {"prefill": _random(case, options, 0, options["block"], keep)}
    elif method == "streaming":  # its places are its own: it takes queries and keys before their rotation
        sparse = {"prefill": method, "prefill_options": options}
        q, k = map(jnp.asarray, case.kept)
        reads.append(share_of_prefill(method, options, q, k, None))
    else:

        def counted(q: Array, k: Array, v: Array, *, scale: float | None) -> Array:
            keep(share_of_prefill(method, options, q, k, scale))
            return PREFILLS[method](q, k, v, scale=scale, **options)

        sparse = {"prefill": counted}

    def read(model: LanguageModel, tokens: Tokens) -> Array:
        return model.with_attention(**sparse).hidden(tokens)[0]

    bits, recall = _scores(case, read)
    jax.effects_barrier()
    return Quality(float(np.mean(reads)), 0.0, bits, recall)


def at_decoding(case: Case, method: str, options: Mapping[str, Any]) -> Quality:
    """The last `decoded` bytes of a row, a question among them, are read one by one after a dense prefill of those
    before; each next byte is given."""
    reads: list[Array] = []
    side = 0.0
    if method == RANDOM:
        keep = lambda read: jax.debug.callback(reads.append, read)  # noqa: E731
        random: dict[str, Any] = {"prefill": _random(case, options, case.prompt, 1, keep)}

        def read(model: LanguageModel, tokens: Tokens) -> Array:
            return model.with_attention(**random).hidden(tokens)[0][:, case.prompt :]
    else:
        attached: dict[str, Any] = {} if method == DENSE else {"decode": method, "decode_options": options}
        decoder = Dense() if method == DENSE else DECODERS[method](**options)

        def read(model: LanguageModel, tokens: Tokens) -> Array:
            model = model.with_attention(**attached)
            _, state = model.hidden(tokens[:, : case.prompt], model.init_state(*tokens.shape))
            return model.hidden(tokens[:, case.prompt :], state)[0]

        q, k = case.kept
        count = jax.jit(lambda q, k: share_of_decoder(decoder, q, k, case.prompt))
        reads += [count(q[i : i + 1], k[i : i + 1]) for i in range(len(q))]
        side = side_share(method, options, case.sizes.keys, q.shape[3])
    bits, recall = _scores(case, read)
    jax.effects_barrier()
    return Quality(float(np.mean(reads)), side, bits, recall)


def _random(
    case: Case, options: Mapping[str, Any], first: int, query_block: int, keep: Callable[[Array], None]
) -> Callable[..., Array]:
    share, block = options["share"], options["block"]
    size = {"first": first, "length": case.sizes.keys, "query_block": query_block, "block_size": block}
    return read_randomly(share, block, first, query_block, lambda lists: keep(share_of_lists(lists, **size)))


def _scores(case: Case, read: Callable[[LanguageModel, Tokens], Float[Array, "B t D"]]) -> tuple[float, float]:
    """Bits per byte of text and recall of needles, where `read` gives the hidden states of the last bytes."""
    plan, parameters = case.trained.blueprint, case.trained.parameters

    @jax.jit
    def score(parameters: Any, rows: Array) -> tuple[Array, Array]:
        model = plan.model(parameters)
        hidden = read(model, rows[:, :-1])
        losses = token_losses(hidden, model.head_weights(), rows[:, rows.shape[1] - hidden.shape[1] :])
        answer = jnp.argmax(model.logits(hidden[:, -1:])[:, 0], axis=-1)
        return jnp.mean(losses, axis=1) / jnp.log(2), answer == rows[:, -1]

    def of_all(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [score(parameters, jnp.asarray(rows[i : i + case.batch])) for i in range(0, len(rows), case.batch)]
        bits, right = zip(*parts, strict=True)
        return np.concatenate(bits), np.concatenate(right)

    return float(of_all(case.data.text)[0].mean()), float(of_all(case.data.needles)[1].mean())
