"""The legend of dimension names, and the array types that every signature uses.

B   batch
T   tokens (queries);  M tokens (keys), where they differ
H   heads;  G heads shared by several others (key heads of grouped-query attention, groups of Mamba-2)
K   dimension of a query or key head
V   dimension of a value head
D   model dimension (the residual stream)
C   tokens in a chunk;  N chunks
W   window, or width of a convolution

Sequences are laid out [B, T, H, K] ("BTHD"), states [B, H, K, V]: rows are the key dimension, columns the value
dimension. A name inside one signature stands for one size.
"""

from jaxtyping import Array, Bool, Float, Int

Scalar = Float[Array, ""]

Queries = Float[Array, "B T H K"]
Keys = Float[Array, "B T G K"]
Values = Float[Array, "B T H V"]
HeadDecay = Float[Array, "B T H"] | Float[Array, " H"]  # natural logarithm, <= 0
MatrixState = Float[Array, "B H K V"]  # float32

SegmentIds = Int[Array, "B T"]  # documents of a packed row, non-decreasing; negative marks padding
Positions = Int[Array, "B T"]
Tokens = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T vocab"]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "HeadDecay",
    "Hidden",
    "Int",
    "Keys",
    "Logits",
    "MatrixState",
    "Positions",
    "Queries",
    "Scalar",
    "SegmentIds",
    "Tokens",
    "Values",
]
