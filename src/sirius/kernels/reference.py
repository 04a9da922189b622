"""The operations in plain PyTorch: what every kernel must compute.

Weights are neuron-major: gate, up and down are all [F, H] and row j belongs to neuron j, so a skipped neuron is three
skipped rows. `linear` and `project` also take a stack of weights [B, F, H], one for each row of x [B, T, H].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius.kernels.activations import Activation
from sirius.kernels.quantized import Quantized, rounded
from sirius.kernels.quantized import dequantize as dequantize
from sirius.kernels.quantized import quantize as quantize

Weight = tuple[Tensor, Tensor | None]  # a matrix with its bias, where it has one


class NormForm(NamedTuple):
    """How models differ in their norms.

    offset  added to the weight: 1 where weights are learnt from 0 on, else 0
    early   the quotient is rounded to the dtype before it meets the weight
    """

    offset: float
    early: bool


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the products of x [..., H] with the rows of weight [F, H] at index [k] int64, [..., k]; all without it.

    bias  [F], or [B, 1, F] of a stack
    """
    if index is not None:
        weight, bias = weight[index], None if bias is None else bias[index]
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    product = x @ weight.mT
    return product if bias is None else product + bias


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the rows of weight [F, H] at index [k] int64 added up, weighed by z [..., k], [..., H]; bias [H]."""
    if index is not None:
        weight = weight[index]
    if weight.ndim == 2:
        return F.linear(z, weight.t(), bias)
    product = z @ weight
    return product if bias is None else product + bias


def largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of values [..., F] at least 0, [..., count] int64, ascending."""
    return values.topk(count, dim=-1).indices.sort(dim=-1).values


def gate(x: Tensor, gate: Weight, activation: Activation, index: Tensor | None = None) -> Tensor:
    """Return act(gate(x)) of x [..., H], of the neurons at index [k] int64, [..., k]; of all without it, [..., F]."""
    return activation(linear(x, *gate, index))


def glu(x: Tensor, gate: Weight, up: Weight, activation: Activation, index: Tensor | None = None) -> Tensor:
    """Return z = act(gate(x)) * up(x) of x [..., H], of the neurons at index [k] int64, [..., k]; of all without it."""
    return activation(linear(x, *gate, index)) * linear(x, *up, index)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, heads, T, D] rotated by angles whose cosine and sine have its shape: x cos + (-x2, x1) sin.

    x1 and x2 are the halves of D. Source: RoFormer (arXiv 2104.09864), section 3.4.2, in the order that Llama has.
    """
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def up_rows(gated: Tensor, x: Tensor, up: Tensor, up_bias: Tensor | None, index: Tensor) -> Tensor:
    """Return z [..., k] of the neurons at index [k] int64, of gated = act(gate(x)) [..., F] and x [..., H]."""
    return gated[..., index] * linear(x, up, up_bias, index)


def finish(gated: Tensor, x: Tensor, up: Weight, down: Weight, index: Tensor | None = None) -> Tensor:
    """Return what gated neurons come to, down(gated * up(x)) [..., H] of x [..., H].

    gated   [..., F]   act(gate(x)) of all neurons
    up      [F, H], its bias [F]; down likewise, its bias [H]
    index   [k] int64  the neurons that are computed; all without it
    """
    gated = gated if index is None else gated[..., index]
    return project(gated * linear(x, *up, index), *down, index)


def each(
    x: Tensor, weights: tuple[Weight, Weight, Weight], activation: Activation, index: Tensor, counts: Sequence[int]
) -> Tensor:
    """Return the MLP of x [B, T, H], each row with neurons of its own.

    weights  of gate, up and down
    index    [sum of counts] int64  the neurons of all rows, one row after the other
    counts   [B]                    how many each row has
    """
    first, up, down = weights
    rows = zip(x, index.split(list(counts)), strict=True)
    return torch.stack([project(glu(row, first, up, activation, own), *down, own) for row, own in rows])


def put(store: Tensor, rows: Tensor, slots: Tensor, values: Tensor) -> None:
    """Write values [B, T, heads, D] to the slots [B, T] int64 of rows [B, 1] int64 of a store [R, S, heads, D]."""
    store[rows, slots] = values


def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """Return x [..., H] over its root mean square, times weight [H], in float32 or wider.

    eps  added to the mean of the squares
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    if form.early:
        wide = wide.to(x.dtype).to(wide.dtype)
    return (wide * (weight.to(wide.dtype) + form.offset)).to(x.dtype)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, seen: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Return the attention of T tokens of each row over the row's slots, [B, T, Hq, D]; softmax in float32 or wider.

    query    [B, Hq, T, D]   of the tokens; Hq is a multiple of Hkv, neighbouring heads share keys and values
    keys     [B, S, Hkv, D]  of the slots, as are values
    held     [B] int64       slots that each row holds: every token sees them
    seen     [B, T, M] bool  which of the M slots after those each token sees; slots past S are seen by none
    scale    of the scores query.key
    softcap  scores become softcap * tanh(score / softcap)

    A token that sees no slot is given zeros.
    """
    (slots, kv_heads), (heads, tokens) = keys.shape[1:3], query.shape[1:3]
    offset = torch.arange(slots, device=held.device) - held[:, None]  # [B, S]; below 0 held
    after = offset.clamp(0, seen.shape[2] - 1)[:, None].expand(-1, tokens, -1)
    allowed = (offset < 0)[:, None] | (seen.gather(2, after) & ((offset >= 0) & (offset < seen.shape[2]))[:, None])
    q, k, v = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (query, keys, values))
    k, v = (each.repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for each in (k, v))
    scores = scale * (q @ k.mT)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    hidden = ~allowed[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    return (weights @ v).transpose(1, 2).to(query.dtype)


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """Return the products of x [..., H], rounded to 8 bits, with the rows of a weight [F, H] at index [k] int64.

    See `quantized.rounded` for the rounding. Products and sums are float32 or wider; the result [..., k], or [..., F]
    without an index, has x's dtype. bias [F]
    """
    if index is not None:
        weight, bias = weight.rows(index), None if bias is None else bias[index]
    product = F.linear(rounded(x), dequantize(weight))
    return (product if bias is None else product + bias).to(x.dtype)


def quantized_glu(
    x: Tensor,
    gate: Quantized,
    gate_bias: Tensor | None,
    up: Quantized,
    up_bias: Tensor | None,
    activation: Activation,
    index: Tensor | None = None,
) -> Tensor:
    """Return act(gate(x)) * up(x) [..., k] of x [..., H], the products as in `quantized_linear`."""
    gated = activation(quantized_linear(x, gate, gate_bias, index))
    return gated * quantized_linear(x, up, up_bias, index)


def highest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of values [..., V], of any sign, [..., count] int64, in any order."""
    return values.topk(count, dim=-1, sorted=False).indices
