"""The GPU's programs, in Triton: products with some rows of a weight, the largest of a line, attention over slots.

`gpu.py` and `attention.py` launch them and say what their tensors are. A program sums in float32 and in a fixed order.
Whatever may pass 2^31 elements is counted in int64.
"""

# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# what Triton compiles is not what Python would run

import triton
import triton.language as tl

NEGATIVE = tl.constexpr(0x80000000)  # the sign of a float32
INFINITE = tl.constexpr(0x7F800000)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2u)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)  # NaN stays NaN
    else:
        tl.static_assert(ACTIVATION is None, "no such activation")
    return v


@triton.jit
def _neurons_at(index, position, count):
    """The neurons at positions of an index, or of all where there is none; -1: no neuron."""
    if index is None:
        neuron = tl.where(position < count, position, -1)
    else:
        neuron = tl.load(index + position, mask=position < count, other=-1)
    return neuron


@triton.jit
def _tile(start, row, column, H, keep, policy: tl.constexpr, EVEN: tl.constexpr):
    """The columns of some rows of a matrix [., H], 0 where a row is not to be kept; EVEN: every column is inside."""
    mask = keep[:, None] if EVEN else keep[:, None] & (column < H)[None, :]
    return tl.load(start + row[:, None] * H + column[None, :], mask=mask, other=0.0, eviction_policy=policy)


@triton.jit
def _multiply(total, weights, xs):
    """Add to total what a tile of weights [F, H] and one of x [R, H] give: of one row unsummed, [F, H], else [F, R]."""
    if xs.shape[0] == 1:
        total += weights.to(tl.float32) * xs.to(tl.float32)
    else:
        total = tl.dot(weights, tl.trans(xs), total, input_precision="ieee")
    return total


@triton.jit
def _finish(total, bias, neuron, ONE_ROW: tl.constexpr):
    """The products [F, R] of what `_multiply` summed up, with their bias."""
    if ONE_ROW:
        total = tl.sum(total, 1, keep_dims=True)
    if bias is not None:
        total += tl.load(bias + neuron, mask=neuron >= 0, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def linear_kernel(
    x,
    weight,
    weight_bias,
    second,
    second_bias,
    gated,
    index,
    z,
    rows,
    count,
    F,
    H,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """z = act(x.weight), times x.second or gated where they are given: BLOCK_F neurons of BLOCK_R rows."""
    blocks = tl.cdiv(rows, BLOCK_R)  # those of the same weights run side by side
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    position = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    neuron = _neurons_at(index, position, count)
    read = neuron >= 0

    WIDTH: tl.constexpr = BLOCK_H if BLOCK_R == 1 else BLOCK_R
    total = tl.zeros([BLOCK_F, WIDTH], tl.float32)
    other = tl.zeros([BLOCK_F, WIDTH], tl.float32)
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        xs = _tile(x, row, column, H, row < rows, "evict_last", EVEN_H)
        total = _multiply(total, _tile(weight, neuron, column, H, read, "evict_first", EVEN_H), xs)
        if second is not None:
            other = _multiply(other, _tile(second, neuron, column, H, read, "evict_first", EVEN_H), xs)

    value = _activate(_finish(total, weight_bias, neuron, BLOCK_R == 1), ACTIVATION)
    if second is not None:
        value *= _finish(other, second_bias, neuron, BLOCK_R == 1)
    inside = (row < rows)[None, :] & (position < count)[:, None]
    if gated is not None:
        value *= tl.load(gated + row[None, :] * F + neuron[:, None], mask=inside & read[:, None], other=0.0)
    value = tl.where(read[:, None], value, 0.0)
    tl.store(z + row[None, :] * count + position[:, None], value, mask=inside)


@triton.jit
def project_kernel(
    z,
    weight,
    index,
    partial,
    rows,
    count,
    H,
    share,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """partial [S, rows, H] float32: the rows of weight weighed by z, added up over one slice of `share` neurons."""
    row_blocks = tl.cdiv(rows, BLOCK_R)
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rest = tl.program_id(0) // row_blocks
    column = (rest % tl.cdiv(H, BLOCK_H)) * BLOCK_H + tl.arange(0, BLOCK_H)
    piece = (rest // tl.cdiv(H, BLOCK_H)).to(tl.int64)

    total = tl.zeros([BLOCK_F if BLOCK_R == 1 else BLOCK_R, BLOCK_H], tl.float32)
    for start in range(0, share, BLOCK_F):
        position = piece * share + start + tl.arange(0, BLOCK_F)
        neuron = _neurons_at(index, position, count)
        read = neuron >= 0
        at = z + row[:, None] * count + position[None, :]
        zs = tl.load(at, mask=(row < rows)[:, None] & read[None, :], other=0.0, eviction_policy="evict_last")
        weights = _tile(weight, neuron, column, H, read, "evict_first", EVEN_H)
        if BLOCK_R == 1:
            total += weights.to(tl.float32) * tl.trans(zs).to(tl.float32)
        else:
            total = tl.dot(zs, weights, total, input_precision="ieee")

    if BLOCK_R == 1:
        total = tl.sum(total, 0, keep_dims=True)
    at = partial + (piece * rows + row)[:, None] * H + column[None, :]
    tl.store(at, total, mask=(row < rows)[:, None] & (column < H)[None, :])


@triton.jit
def add_kernel(partial, bias, y, size, H, SLICES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """y [size] = the slices of partial [SLICES, size] added up in a fixed order, with the bias [H]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.arange(0, BLOCK_S).to(tl.int64)
    mask = (piece < SLICES)[:, None] & (at < size)[None, :]
    total = tl.sum(tl.load(partial + piece[:, None] * size + at[None, :], mask=mask, other=0.0), 0)
    if bias is not None:
        total += tl.load(bias + at % H, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, total, mask=at < size)


@triton.jit
def largest_kernel(values, found, F, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """found [count] = the indices of the largest of a line, ascending; BITS: how many of a float32 its dtype uses.

    A float's bits, with those of negative ones turned round, are ordered as the floats are. So the count-th largest is
    found bit by bit: a bit is set where enough numbers are no smaller. Of those that equal it, the first are taken.
    """
    line = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    value = tl.load(values + line * F + position, mask=position < F, other=0.0).to(tl.float32)
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == NEGATIVE, 0, bits)  # -0 equals 0
    key = tl.where(bits >= NEGATIVE, ~bits, bits | NEGATIVE)
    key = tl.where((bits & 0x7FFFFFFF) > INFINITE, 0xFFFFFFFF, key)  # NaN is before all
    key = tl.where(position < F, key >> (32 - BITS), 0)

    least = tl.zeros([1], tl.uint32)
    for step in range(BITS):
        tried = least | (tl.full([1], 1, tl.uint32) << (BITS - 1 - step))
        least = tl.where(tl.sum((key >= tried).to(tl.int32)) >= count, tried, least)

    above, equal = key > least, (key == least) & (position < F)
    wanted = count - tl.sum(above.to(tl.int32))
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= wanted))
    at = tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(found + line * count + at, position.to(tl.int64), mask=kept)


@triton.jit
def _slots(base, first, stride, D, keep, BLOCK_D: tl.constexpr):
    """The keys or values [N, BLOCK_D] of slots from first on, 0 where a slot is not to be kept."""
    column, mask = tl.arange(0, BLOCK_D), keep[:, None]
    if D != BLOCK_D:
        mask = mask & (column < D)[None, :]
    at = base + first * tl.cast(stride, tl.int64) + tl.arange(0, keep.shape[0])[:, None] * stride
    return tl.load(at + column[None, :], mask=mask, other=0.0)


@triton.jit
def _scores(q, k, scale, softcap):
    """The scores [R, N] of queries and keys, in powers of two."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if softcap is not None:  # tanh(u) = 2 sigmoid(2u) - 1
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return scores * LOG2_E


@triton.jit
def _soften(total, greatest, weight, scores, v):
    """Add values v [N, D] to total [R, D], by the softmax of scores [R, N] as far as they are known."""
    new = tl.maximum(greatest, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
    before, part = tl.exp2(greatest - base), tl.exp2(scores - base[:, None])
    total = tl.dot(part.to(v.dtype), v, total * before[:, None], input_precision="ieee")
    return total, new, weight * before + tl.sum(part, 1)


@triton.jit
def _share(split, length, bound, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One share of the slots below bound, in whole blocks: its first, its first block past length, its end."""
    share = tl.cdiv(tl.cdiv(bound, SPLITS), BLOCK_N) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, bound)
    return first, first + tl.maximum(tl.minimum(last, length) - first, 0) // BLOCK_N * BLOCK_N, last


@triton.jit
def _allowed(seen, position, window, inside):
    """Whether queries see the slots at offsets [N] after what their row holds, [R, N]; seen: where a query's begin."""
    asked = inside[:, None] & ((position >= 0) & (position < window))[None, :]
    return (position < 0)[None, :] | (tl.load(seen[:, None] + position[None, :], mask=asked, other=0) != 0)


@triton.jit
def attend_kernel(
    query,
    keys,
    values,
    held,
    seen,
    totals,
    sums,
    query_strides,
    key_strides,
    value_strides,
    scale,
    softcap,
    slots,
    window,
    tokens,
    groups,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The attention of up to BLOCK_R queries of one key head to one share of the slots in use.

    Of every line of queries [B, Hkv, groups * tokens] and share, totals [., SPLITS, D] has the values added up, sums
    [., SPLITS, 2] the greatest score and the sum of the weights.
    """
    split, b, lines = tl.program_id(0), tl.program_id(2).to(tl.int64), groups * tokens
    blocks = tl.cdiv(lines, BLOCK_R)
    head, line = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    token, column, inside = line % tokens, tl.arange(0, BLOCK_D), line < lines
    at = b * query_strides[0] + (head * groups + line // tokens) * query_strides[1] + token * query_strides[2]
    q = tl.load(query + at[:, None] + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0)
    keys += b * key_strides[0] + head * key_strides[2]
    values += b * value_strides[0] + head * value_strides[2]

    length = tl.load(held + b).to(tl.int32)
    first, after, last = _share(split, length, tl.minimum(length + window, slots), SPLITS, BLOCK_N)
    total, weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    greatest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    every = tl.full([BLOCK_N], 1, tl.int1)
    for start in range(first, after, BLOCK_N):  # held, seen by all
        k = _slots(keys, start, key_strides[1], D, every, BLOCK_D)
        v = _slots(values, start, value_strides[1], D, every, BLOCK_D)
        total, greatest, weight = _soften(total, greatest, weight, _scores(q, k, scale, softcap), v)
    for start in tl.range(after, last, BLOCK_N, num_stages=1):  # few
        position = start + tl.arange(0, BLOCK_N) - length
        allowed = _allowed(seen + (b * tokens + token) * window, position, tl.minimum(window, slots - length), inside)
        used = tl.max(allowed.to(tl.int32), 0) > 0  # a slot that nobody sees may hold anything
        k = _slots(keys, start, key_strides[1], D, used, BLOCK_D)
        v = _slots(values, start, value_strides[1], D, used, BLOCK_D)
        scores = tl.where(allowed, _scores(q, k, scale, softcap), float("-inf"))
        total, greatest, weight = _soften(total, greatest, weight, scores, v)

    out = ((b * (tl.num_programs(1) // blocks) + head) * lines + line) * SPLITS + split
    tl.store(sums + 2 * out, greatest, mask=inside)
    tl.store(sums + 2 * out + 1, weight, mask=inside)
    written = line < tl.where(first < last, lines, 0)
    tl.store(totals + out[:, None] * D + column[None, :], total, mask=written[:, None] & (column < D)[None, :])


@triton.jit
def combine_kernel(
    totals, sums, y, tokens, groups, heads, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """y [B, tokens, heads, D] = what the shares of `attend_kernel` come to together."""
    line = tl.program_id(0).to(tl.int64)
    split, column = line * SPLITS + tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    greatest = tl.load(sums + 2 * split)
    seen = greatest != float("-inf")
    factor = tl.where(seen, tl.exp2(greatest - tl.max(greatest, 0)), 0.0)
    weight = tl.sum(factor * tl.load(sums + 2 * split + 1), 0)
    mask = seen[:, None] & (column < D)[None, :]
    parts = tl.load(totals + split[:, None] * D + column[None, :], mask=mask, other=0.0)
    total = tl.sum(factor[:, None] * parts, 0) / tl.where(weight == 0, 1.0, weight)

    lines, kv_heads = groups * tokens, heads // groups
    head = line // lines % kv_heads * groups + line % lines // tokens
    at = (line // (lines * kv_heads) * tokens + line % tokens) * heads + head
    tl.store(y + at * D + column, total, mask=column < D)
