"""The four Triton kernels of scalar decay and its gradient; equations and shapes are in `scalar_decay`.

A program's number counts blocks fastest, then heads, then chunks, then rows: neighbours share what they read. Arrays
may exceed 2^31 elements, so offsets of rows and chunks are 64-bit. Tiles are filled up with zeros beyond the last token
and the last channel. Constants are written in capitals; X_HEADS heads of x serve HEADS heads, each consecutive ones.
"""

import triton
import triton.language as tl


@triton.jit
def tile(base, rows, stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a matrix at `base` that has no more than `rows` and `columns`."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(base + i * stride + j, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def put(base, x, rows, stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(base + i * stride + j, x.to(base.dtype.element_ty), mask=(i < rows) & (j < columns))


@triton.jit
def decay(steps, fine, documents, STEP: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """D_ij = e^{G_i - G_j} for j <= i of the same document (or its transpose); masked before the exponential."""
    i = tl.arange(0, CHUNK)
    s, f, d = tl.load(steps + i), tl.load(fine + i), tl.load(documents + i)
    exponent = (s[:, None] - s[None, :]) * STEP + (f[:, None] - f[None, :])
    later = i[:, None] >= i[None, :]
    if REVERSE:
        exponent = -exponent
        later = i[:, None] <= i[None, :]
    mask = later & (d[:, None] == d[None, :]) & (d[:, None] >= 0)
    return tl.exp(tl.where(mask, exponent, float("-inf")))


@triton.jit
def walk_states(
    x,  # [B, T, X_HEADS, K]
    y,  # [B, T, Y_HEADS, V]
    factor,  # [B, HEADS, CHUNKS CHUNK]
    keep,  # [B, HEADS, CHUNKS]
    start,  # [B, HEADS, K, V]
    states,  # [B, HEADS, CHUNKS, K, V]
    last,  # [B, HEADS, K, V]
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    X_HEADS: tl.constexpr,
    Y_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S <- keep S + x^T diag(factor) y, chunk after chunk, of one block of S; each chunk's S before it is stored."""
    program = tl.program_id(0)
    v_blocks = (V + BLOCK_V - 1) // BLOCK_V
    k_blocks = (K + BLOCK_K - 1) // BLOCK_K
    v0 = program % v_blocks * BLOCK_V
    k0 = program // v_blocks % k_blocks * BLOCK_K
    head = (program // (v_blocks * k_blocks)).to(tl.int64)  # of all rows
    row, h = head // HEADS, head % HEADS
    x += (row * LENGTH * X_HEADS + h // (HEADS // X_HEADS)) * K + k0
    y += (row * LENGTH * Y_HEADS + h // (HEADS // Y_HEADS)) * V + v0
    factor += head * CHUNKS * CHUNK
    keep += head * CHUNKS
    corner = k0 * V + v0
    states += head * CHUNKS * K * V + corner
    state = tile(start + head * K * V + corner, K - k0, V, V - v0, BLOCK_K, BLOCK_V)
    token = tl.arange(0, CHUNK)
    k, v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    for step in range(0, CHUNKS):
        n = CHUNKS - 1 - step if REVERSE else step
        first = tl.cast(n, tl.int64) * CHUNK
        put(states + first // CHUNK * K * V, state, K - k0, V, V - v0, BLOCK_K, BLOCK_V)
        here = first + token < LENGTH
        x_transposed = tl.load(
            x + first * X_HEADS * K + token[None, :] * (X_HEADS * K) + k[:, None],
            mask=here[None, :] & (k[:, None] < K - k0),
            other=0.0,
        )
        written = tl.load(
            y + first * Y_HEADS * V + token[:, None] * (Y_HEADS * V) + v[None, :],
            mask=here[:, None] & (v[None, :] < V - v0),
            other=0.0,
        )
        written = written.to(tl.float32) * tl.load(factor + first + token)[:, None]
        state = state * tl.load(keep + n)
        state = tl.dot(x_transposed, written.to(x_transposed.dtype), state, input_precision=PRECISION)
    put(last + head * K * V + corner, state, K - k0, V, V - v0, BLOCK_K, BLOCK_V)


@triton.jit
def outputs(
    q,  # [B, T, Q_HEADS, K]
    k,  # [B, T, K_HEADS, K]
    v,  # [B, T, V_HEADS, V]
    states,  # [B, HEADS, CHUNKS, K, V], entering each chunk
    steps,  # [B, HEADS, CHUNKS CHUNK]; so are fine and read
    fine,
    read,
    documents,  # [B, CHUNKS CHUNK]
    out,  # [B, T, HEADS, V]
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O = scale (((Q K^T) * D) V + diag(read) Q S), of one chunk and block of V."""
    program = tl.program_id(0)
    v_blocks = (V + BLOCK_V - 1) // BLOCK_V
    v0 = program % v_blocks * BLOCK_V
    h = program // v_blocks % HEADS
    chunk = (program // (v_blocks * HEADS)).to(tl.int64)  # of all rows
    row, n = chunk // CHUNKS, chunk % CHUNKS
    token, left = row * LENGTH + n * CHUNK, LENGTH - n * CHUNK
    q += (token * Q_HEADS + h // (HEADS // Q_HEADS)) * K
    k += (token * K_HEADS + h // (HEADS // K_HEADS)) * K
    v += (token * V_HEADS + h // (HEADS // V_HEADS)) * V + v0
    out += (token * HEADS + h) * V + v0
    states += ((row * HEADS + h) * CHUNKS + n) * K * V + v0
    gate = ((row * HEADS + h) * CHUNKS + n) * CHUNK

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    o = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        queries = tile(q + k0, left, Q_HEADS * K, K - k0, CHUNK, BLOCK_K)
        keys = tile(k + k0, left, K_HEADS * K, K - k0, CHUNK, BLOCK_K)
        state = tile(states + k0 * V, K - k0, V, V - v0, BLOCK_K, BLOCK_V)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        o = tl.dot(queries, state, o, input_precision=PRECISION)
    scores *= decay(steps + gate, fine + gate, documents + chunk * CHUNK, STEP, CHUNK, False) * SCALE
    o *= tl.load(read + gate + tl.arange(0, CHUNK))[:, None] * SCALE
    values = tile(v, left, V_HEADS * V, V - v0, CHUNK, BLOCK_V)
    o = tl.dot(scores.to(values.dtype), values, o, input_precision=PRECISION)
    put(out, o, left, HEADS * V, V - v0, CHUNK, BLOCK_V)


@triton.jit
def gradients_of_queries_and_keys(
    q,  # [B, T, Q_HEADS, K]
    k,  # [B, T, K_HEADS, K]
    v,  # [B, T, V_HEADS, V]
    d_out,  # [B, T, HEADS, V]
    states,  # [B, HEADS, CHUNKS, K, V], entering each chunk
    d_states,  # the same, gradients of those that leave
    steps,  # [B, HEADS, CHUNKS CHUNK]; so are fine, read and write
    fine,
    read,
    write,
    documents,  # [B, CHUNKS CHUNK]
    dq,  # [B, T, HEADS, K]
    dk,  # [B, T, HEADS, K]
    after,  # [K_BLOCKS, B, HEADS, CHUNKS CHUNK]; so is before
    before,
    overlap,  # [K_BLOCKS, B, HEADS, CHUNKS]
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With A = scale (dO V^T) * D, of one chunk and block of K:

    dQ = A K + scale diag(read) dO S^T      dK = A^T Q + diag(write) V dS'^T

    and the pieces of the gates' gradient, all in float32: rows less columns of A * (Q K^T) off the diagonal, where a
    decay is 1 and has no gradient, with q . (dq from S), k . (dk from dS') and <S, dS'>.
    """
    program = tl.program_id(0)
    k_blocks = (K + BLOCK_K - 1) // BLOCK_K
    block = program % k_blocks
    k0 = block * BLOCK_K
    h = program // k_blocks % HEADS
    chunk = (program // (k_blocks * HEADS)).to(tl.int64)  # of all rows
    row, n = chunk // CHUNKS, chunk % CHUNKS
    token, left = row * LENGTH + n * CHUNK, LENGTH - n * CHUNK
    q += (token * Q_HEADS + h // (HEADS // Q_HEADS)) * K + k0
    k += (token * K_HEADS + h // (HEADS // K_HEADS)) * K + k0
    v += (token * V_HEADS + h // (HEADS // V_HEADS)) * V
    d_out += (token * HEADS + h) * V
    place = (row * HEADS + h) * CHUNKS + n
    states += (place * K + k0) * V
    d_states += (place * K + k0) * V
    gate = place * CHUNK
    i = tl.arange(0, CHUNK)

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    from_state = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    from_end = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    both = tl.zeros([BLOCK_K], tl.float32)
    for v0 in range(0, V, BLOCK_V):
        d_o = tile(d_out + v0, left, HEADS * V, V - v0, CHUNK, BLOCK_V)
        values = tile(v + v0, left, V_HEADS * V, V - v0, CHUNK, BLOCK_V)
        state = tile(states + v0, K - k0, V, V - v0, BLOCK_K, BLOCK_V)
        d_state = tile(d_states + v0, K - k0, V, V - v0, BLOCK_K, BLOCK_V)
        scores = tl.dot(d_o, tl.trans(values), scores, input_precision=PRECISION)
        from_state = tl.dot(d_o, tl.trans(state), from_state, input_precision=PRECISION)
        from_end = tl.dot(values, tl.trans(d_state), from_end, input_precision=PRECISION)
        both += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
    scores *= decay(steps + gate, fine + gate, documents + chunk * CHUNK, STEP, CHUNK, False) * SCALE
    from_state *= tl.load(read + gate + i)[:, None] * SCALE
    from_end *= tl.load(write + gate + i)[:, None]

    queries = tile(q, left, Q_HEADS * K, K - k0, CHUNK, BLOCK_K)
    keys = tile(k, left, K_HEADS * K, K - k0, CHUNK, BLOCK_K)
    pairs = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scores
    pairs = tl.where(i[:, None] == i[None, :], 0.0, pairs)
    part = (block * ROWS * HEADS * CHUNKS).to(tl.int64)
    grows = tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.sum(queries.to(tl.float32) * from_state, 1)
    tl.store(after + part * CHUNK + gate + i, grows)
    tl.store(before + part * CHUNK + gate + i, tl.sum(keys.to(tl.float32) * from_end, 1))
    tl.store(overlap + part + place, tl.sum(both, 0))

    scores = scores.to(queries.dtype)
    d_queries = tl.dot(scores, keys, from_state, input_precision=PRECISION)
    put(dq + (token * HEADS + h) * K + k0, d_queries, left, HEADS * K, K - k0, CHUNK, BLOCK_K)
    d_keys = tl.dot(tl.trans(scores), queries, from_end, input_precision=PRECISION)
    put(dk + (token * HEADS + h) * K + k0, d_keys, left, HEADS * K, K - k0, CHUNK, BLOCK_K)


@triton.jit
def gradients_of_values(
    q,  # [B, T, Q_HEADS, K]
    k,  # [B, T, K_HEADS, K]
    d_out,  # [B, T, HEADS, V]
    d_states,  # [B, HEADS, CHUNKS, K, V], gradients of those that leave each chunk
    steps,  # [B, HEADS, CHUNKS CHUNK]; so are fine and write
    fine,
    write,
    documents,  # [B, CHUNKS CHUNK]
    dv,  # [B, T, HEADS, V]
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dV = scale ((Q K^T) * D)^T dO + diag(write) K dS', of one chunk and block of V."""
    program = tl.program_id(0)
    v_blocks = (V + BLOCK_V - 1) // BLOCK_V
    v0 = program % v_blocks * BLOCK_V
    h = program // v_blocks % HEADS
    chunk = (program // (v_blocks * HEADS)).to(tl.int64)  # of all rows
    row, n = chunk // CHUNKS, chunk % CHUNKS
    token, left = row * LENGTH + n * CHUNK, LENGTH - n * CHUNK
    q += (token * Q_HEADS + h // (HEADS // Q_HEADS)) * K
    k += (token * K_HEADS + h // (HEADS // K_HEADS)) * K
    d_out += (token * HEADS + h) * V + v0
    dv += (token * HEADS + h) * V + v0
    d_states += ((row * HEADS + h) * CHUNKS + n) * K * V + v0
    gate = ((row * HEADS + h) * CHUNKS + n) * CHUNK

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_values = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        queries = tile(q + k0, left, Q_HEADS * K, K - k0, CHUNK, BLOCK_K)
        keys = tile(k + k0, left, K_HEADS * K, K - k0, CHUNK, BLOCK_K)
        d_state = tile(d_states + k0 * V, K - k0, V, V - v0, BLOCK_K, BLOCK_V)
        scores = tl.dot(keys, tl.trans(queries), scores, input_precision=PRECISION)
        d_values = tl.dot(keys, d_state, d_values, input_precision=PRECISION)
    scores *= decay(steps + gate, fine + gate, documents + chunk * CHUNK, STEP, CHUNK, True) * SCALE
    d_values *= tl.load(write + gate + tl.arange(0, CHUNK))[:, None]
    d_o = tile(d_out, left, HEADS * V, V - v0, CHUNK, BLOCK_V)
    d_values = tl.dot(scores.to(d_o.dtype), d_o, d_values, input_precision=PRECISION)
    put(dv, d_values, left, HEADS * V, V - v0, CHUNK, BLOCK_V)
