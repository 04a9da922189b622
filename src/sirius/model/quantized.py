"""A model's weights rounded to 4 or 8 bits, kept beside the full ones: a draft reads these in their place."""

import logging
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sirius.core import AUTO, CorrectionConfig, SparsityConfig
from sirius.errors import ConfigError, OutOfMemoryError
from sirius.kernels import ops
from sirius.kernels.activations import Activation
from sirius.kernels.quantized import Quantized, bytes_of, dequantize
from sirius.model.adopt import parts_of
from sirius.model.linear import MatrixLinear
from sirius.model.matrix import Dense, Matrix, Placed, dense
from sirius.model.prepared import prepared_of
from sirius.shortage import SHORTAGE, ran_out

SAMPLED = 8  # rows and columns of each weight that are looked at to notice a change
RESCORED = 16  # candidates of the rounded output head whose scores are computed anew from the full weights
# Linear layers of at most so many weights are rounded to 8 bits where the draft's bits are "auto". A step of so small a
# model takes little of its time to read weights, so the better guesses of 8 bits gain more than the fewer bytes of 4;
# see dev/2026-11-28-draft-bits.md, "Bits by size".
SMALL_MODEL = 150_000_000
LARGE = 10**8  # bytes of rounded weights that are worth a line


class QuantizedRows(NamedTuple):
    """Rows of a layer's weight [F, H] at 4 or 8 bits: a row belongs to an output, or to a neuron of gate and up."""

    weight: Quantized
    bias: Tensor | None

    @property
    def replayable(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.weight.codes), self.weight.length

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def part(self, begin: int, end: int) -> "QuantizedRows":
        return QuantizedRows(self.weight.part(begin, end), None if self.bias is None else self.bias[begin:end])

    def linear(self, x: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return ops.quantized_linear(x, self.weight, self.bias, index)

    def glu(self, x: Tensor, up: Matrix, activation: Activation, index: Tensor | None) -> Tensor | None:
        if not isinstance(up, QuantizedRows):
            return None
        return ops.quantized_glu(x, self.weight, self.bias, up.weight, up.bias, activation, index)

    def project(self, z: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return ops.project(z, dequantize(self.weight).to(z.dtype), self.bias, index, invariant)


class QuantizedColumns(NamedTuple):
    """A down layer's weight [H, F] at 4 or 8 bits, whose inputs are the neurons.

    The weight is rounded along its rows, as a product reads it. So all of it is read also where a draft keeps some of
    the neurons: the others count as zeros.
    """

    weight: Quantized
    bias: Tensor | None

    @property
    def replayable(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.length, len(self.weight.codes)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def part(self, begin: int, end: int) -> "Matrix":
        raise NotImplementedError("no model has one layer for down and another matrix")

    def linear(self, x: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return ops.linear(x, dequantize(self.weight).t().to(x.dtype), None, index, invariant)

    def project(self, z: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        if index is not None:
            z = z.new_zeros(*z.shape[:-1], self.weight.length).index_copy_(-1, index, z)
        return ops.quantized_linear(z, self.weight, self.bias)


class RescoredHead(NamedTuple):
    """An output head at 4 or 8 bits; the scores of its `RESCORED` best tokens come from the full weights.

    Rounding the head alone costs a draft acceptance (measured on SmolLM2: .83 to .79 per guess), and this regains it.
    """

    rounded: QuantizedRows
    full: Dense

    @property
    def replayable(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int]:
        return self.full.shape

    @property
    def nbytes(self) -> int:
        rows, length = self.full.shape
        return self.rounded.nbytes + min(RESCORED, rows) * length * self.full.weight.element_size()

    def part(self, begin: int, end: int) -> "RescoredHead":
        return RescoredHead(self.rounded.part(begin, end), self.full.part(begin, end))

    def linear(self, x: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        if index is not None:
            return self.full.linear(x, index, invariant)
        scores = self.rounded.linear(x)
        flat, tokens = scores.view(-1, scores.shape[-1]), x.reshape(-1, x.shape[-1])
        best = ops.highest(flat, min(RESCORED, flat.shape[1]))
        # every token's candidates are scored for all tokens in one product, of which each token takes its own
        anew = self.full.linear(tokens, best.flatten(), True).view(len(tokens), *best.shape)
        own = anew.diagonal(dim1=0, dim2=1).t()
        return flat.scatter(1, best, own.to(flat.dtype)).view(scores.shape)

    def project(self, z: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return self.full.project(z, index, invariant)


class Twin:
    """Makes the matrices of a draft pass: a model's layers at fewer bits, rounded once.

    bits     4 or 8
    state    tells which weights were rounded, as `_state_of` does
    nbytes   bytes of the rounded weights
    weights  of each layer, by its id; on meta those that do not stay in memory
    shelf    holds these
    """

    def __init__(self, model: PreTrainedModel, bits: int, advance: Callable[[float], None] = lambda done: None) -> None:
        """Round every linear layer of a prepared model; `advance` is told the share that is done, 0 to 1."""
        self.bits, self.state, self.nbytes, self.shelved = bits, _state_of(model), 0, False
        self.weights: dict[int, Quantized] = {}
        self.head = id(cast("nn.Module", model.get_output_embeddings()))
        layers = _linears(model)
        total, done = sum(layer.weight.numel() for layer in layers), 0
        placed = prepared_of(model).placed
        self.shelf = placed.rounded_shelf() if placed else None
        with torch.no_grad():
            for layer in layers:
                weight = placed(layer).weight if placed else layer.weight
                self._add(layer, ops.quantize(weight.detach(), bits))
                advance((done := done + layer.weight.numel()) / total)

    @property
    def replayable(self) -> bool:
        """Whether all rounded weights stay where they are."""
        return not self.shelved

    def _add(self, layer: nn.Linear, weight: Quantized) -> None:
        self.nbytes += weight.nbytes
        if self.shelf is not None and self.shelf.takes(layer):
            self.shelf.put(layer, weight)
            self.shelved = True
            codes, scales, base = (each.to("meta") for each in (weight.codes, weight.scales, weight.base))
            weight = Quantized(codes, scales, base, weight.bits, weight.length)
        self.weights[id(layer)] = weight

    def __call__(self, layer: nn.Linear, transposed: bool = False) -> Matrix:
        """Return a layer's matrix, see `MakeMatrix`."""
        weight = self.weights[id(layer)]
        if weight.codes.is_meta:
            assert self.shelf is not None
            weight = self.shelf.get(layer)
        return self._matrix(layer, weight, transposed)

    def outline(self, layer: nn.Linear, transposed: bool = False) -> Matrix:
        """Return a layer's matrix for its shape and bytes; its numbers may not be there, and are not brought."""
        return self._matrix(layer, self.weights[id(layer)], transposed)

    def _matrix(self, layer: nn.Linear, weight: Quantized, transposed: bool) -> Matrix:
        if transposed:
            return QuantizedColumns(weight, layer.bias)
        rows = QuantizedRows(weight, layer.bias)
        return RescoredHead(rows, dense(layer)) if id(layer) == self.head else rows


def bits_of_draft(
    model: PreTrainedModel, chosen: SparsityConfig, correction: CorrectionConfig | None, own_period: bool = False
) -> int:
    """Return the bits of the weights that drafts of a prepared model read; 0: the model's own, or nothing is drafted.

    Bits "auto" are 8 where the linear layers have at most `SMALL_MODEL` weights, and 4 otherwise. Without a kernel for
    such weights each product makes the full ones anew, so no period pays: with period "auto" they are 0 then, and a
    sparsity method drafts with the model's own weights. They are 0 too where weights are of another kind than dense;
    there a fixed period raises ConfigError.

    own_period  the caller has a period of its own, in place of the correction's
    """
    made, placed = prepared_of(model).matrix, prepared_of(model).placed
    if not chosen.draft_bits or (correction is not None and correction.period == 1):
        return 0
    automatic = _automatic(correction, own_period)
    if placed is not None:
        return _planned_bits(placed, chosen, automatic)
    if made is not dense:
        if automatic:
            return 0
        raise ConfigError(
            f"draft_bits {chosen.draft_bits} rounds weights in memory, and this model's are of another kind; set "
            "draft_bits to 0, and name a sparsity method to draft with"
        )
    bits = chosen.draft_bits
    if bits == AUTO:
        bits = 8 if sum(layer.weight.numel() for layer in _linears(model)) <= SMALL_MODEL else 4
    if ops.multiplies_quantized(model.device, model.dtype):
        return bits
    if not automatic or chosen.draft_bits != AUTO:
        logging.getLogger("sirius").warning(
            "no kernel multiplies weights of %d bits in %s on %s: %s",
            *(bits, model.dtype, model.device),
            "drafts do not read any; leave draft_bits out"
            if automatic
            else "each product makes the full ones anew; set draft_bits to 0, or period to 'auto'",
        )
    return 0 if automatic else bits


def _automatic(correction: CorrectionConfig | None, own_period: bool) -> bool:
    """Tell whether the period is chosen by measurements, so that nothing has to be drafted."""
    return correction is not None and correction.period == AUTO and not own_period


def _planned_bits(made: Placed, chosen: SparsityConfig, automatic: bool) -> int:
    """Return the bits of a draft that a memory budget was planned for; raise ConfigError of others."""
    if chosen.draft_bits == made.rounded or (chosen.draft_bits == AUTO and (made.rounded or automatic)):
        return made.rounded
    planned = f"weights of {made.rounded} bits" if made.rounded else "no weights of fewer bits"
    raise ConfigError(
        f"the memory budget was planned for {planned}, and draft_bits is {chosen.draft_bits}; load the model with "
        f"draft=SparsityConfig('none', draft_bits={4 if chosen.draft_bits == AUTO else chosen.draft_bits}), set "
        "draft_bits to 0, or decode with the default period"
    )


def extra_memory(model: PreTrainedModel, bits: int) -> float:
    """Return the bytes of a prepared model's weights at 4 or 8 bits over those of all its parameters."""
    rounded = sum(bytes_of(layer.out_features, layer.in_features, bits) for layer in _linears(model))
    return rounded / sum(each.nbytes for each in model.parameters())


def make_twin(
    model: PreTrainedModel,
    chosen: SparsityConfig,
    correction: CorrectionConfig | None,
    own_period: bool = False,
    advance: Callable[[float], None] = lambda done: None,
) -> Twin | None:
    """Return the weights of fewer bits that drafts of a prepared model read, None without such; see `bits_of_draft`.

    Where memory has no room for them, bits "auto" with period "auto" do without, and others raise OutOfMemoryError.
    """
    kept, bits = prepared_of(model), bits_of_draft(model, chosen, correction, own_period)
    optional = chosen.draft_bits == AUTO and _automatic(correction, own_period)
    if not bits or (optional and bits in kept.too_large):
        return None
    try:
        return twin_of(model, bits, advance)
    except SHORTAGE as error:
        if not ran_out(error):
            raise
        more = f"no memory for the draft's weights at {bits} bits, {extra_memory(model, bits):.0%} beside the model's"
        if not optional:
            error = error.with_traceback(None)  # it would hold memory
            raise OutOfMemoryError(f"{more}; set draft_bits to 0, or use a narrower dtype") from error
        kept.too_large.add(bits)
        logging.getLogger("sirius").warning("%s: drafts do not read any", more)
        return None


def twin_of(model: PreTrainedModel, bits: int, advance: Callable[[float], None] = lambda done: None) -> Twin:
    """Return a prepared model's weights at 4 or 8 bits, rounded at the first call and after they have changed.

    Those asked for last are kept. Others stay as long as the caller or an open session holds them, and are rounded anew
    afterwards: memory is to hold one kind beside the full weights, not both.
    """
    kept = prepared_of(model)
    with kept.lock:
        twin: Twin | None = kept.twins.get(bits)
        if twin is None or twin.state != _state_of(model):
            twin = kept.last_twin = None  # frees those that nobody holds before there are new ones
            kept.forget_drafts()
            began = perf_counter()
            twin = kept.twins[bits] = Twin(model, bits, advance)
            logging.getLogger("sirius.drafts").log(
                logging.INFO if twin.nbytes >= LARGE else logging.DEBUG,
                "the draft's weights at %d bits take %.0f%% more memory, %.0f MB; rounding them took %.1f s",
                *(bits, 100 * extra_memory(model, bits), twin.nbytes / 1e6, perf_counter() - began),
            )
        kept.forget_drafts(but=twin)
        kept.last_twin = twin
        return twin


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the layers whose weights are rounded."""
    return [cast("nn.Linear", layer) for _, layer in parts_of(model, MatrixLinear)]


def _state_of(model: PreTrainedModel) -> list[object]:
    """Return what tells whether weights are the ones that were rounded: which they are, where they lie, and a sample.

    Changes by `weight.data` leave no other trace than the numbers themselves.
    """
    layers = [each for each in _linears(model) if not each.weight.is_meta]  # files are not looked at
    lie = [(id(each), id(each.weight), each.weight.data_ptr(), _version(each.weight)) for each in layers]
    with torch.no_grad():
        sums = torch.stack([_sample(each.weight).double().sum() for each in layers])
    return [*lie, *sums.cpu().tolist()]


def _version(weight: Tensor) -> int:
    """Return how often a weight was changed in place; one made in inference mode does not count."""
    return 0 if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> Tensor:
    rows, columns = (max(1, size // SAMPLED) for size in weight.shape)
    return weight[::rows, ::columns]
