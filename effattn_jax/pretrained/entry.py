"""One line of a family's table: a tensor of the file, the parameters that lie in it, and how."""

from typing import NamedTuple

from effattn_jax.pretrained.layout import ROWS, SAME, TAPS, Layout


class Entry(NamedTuple):
    """Args:
    tensor: its name in the file, in full.
    parameters: names below the block ("mixer.q_proj.kernel"), or of the model ("embedding").
    layout: how they lie in the tensor.
    at: index on the leading axes of the parameters, (expert,) where experts are stacked.
    """

    tensor: str
    parameters: tuple[str, ...]
    layout: Layout = SAME
    at: tuple[int, ...] = ()


def same(tensor: str, *parameters: str, at: tuple[int, ...] = ()) -> list[Entry]:
    """Parameters as they are."""
    return [Entry(tensor, parameters, SAME, at)]


def linear(
    tensor: str, *projections: str, bias: bool = False, layout: Layout = ROWS, bias_layout: Layout = SAME
) -> list[Entry]:
    """`tensor`.weight holds the kernels of the projections, `tensor`.bias their biases."""
    weights = Entry(f"{tensor}.weight", tuple(f"{name}.kernel" for name in projections), layout)
    biases = Entry(f"{tensor}.bias", tuple(f"{name}.bias" for name in projections), bias_layout)
    return [weights, biases] if bias else [weights]


def convolution(tensor: str, *convolutions: str, bias: bool = False) -> list[Entry]:
    """A depthwise Conv1d over the channels of short convolutions."""
    weights = Entry(f"{tensor}.weight", tuple(f"{name}.taps" for name in convolutions), TAPS)
    biases = Entry(f"{tensor}.bias", tuple(f"{name}.bias" for name in convolutions))
    return [weights, biases] if bias else [weights]


def norm(tensor: str, name: str, bias: bool = False) -> list[Entry]:
    weight = Entry(f"{tensor}.weight", (f"{name}.scale",))
    return [weight, Entry(f"{tensor}.bias", (f"{name}.bias",))] if bias else [weight]
