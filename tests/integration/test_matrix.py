"""Kinds of weights of third parties: they decode, the figures count their bytes, and what is no kind is refused."""

import pytest
import torch
from torch import Tensor, nn

from conftest import greedy, tiny_model
from sirius import ConfigError, Engine, prepare, restore
from sirius.model.matrix import Dense, dense

pytestmark = pytest.mark.integration

PROMPT = [5, 17, 3, 42, 8]


class Rounded:
    """Rows of int8 with a scale each, which are widened for every product."""

    replayable = True

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.numbers, self.scales, self.bias = numbers, scales, bias
        self.shape, self.nbytes = tuple(numbers.shape), numbers.nbytes + scales.nbytes

    @staticmethod
    def of(layer: nn.Linear, transposed: bool) -> "Rounded":
        weight, bias = dense(layer, transposed)
        scales = weight.abs().amax(1, keepdim=True) / 127
        return Rounded((weight / scales).round().to(torch.int8), scales, bias)

    def part(self, begin: int, end: int) -> "Rounded":
        return Rounded(self.numbers[begin:end], self.scales[begin:end], self.bias and self.bias[begin:end])

    def dense(self) -> Dense:
        return Dense(self.numbers * self.scales, self.bias)

    def linear(self, x: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return self.dense().linear(x, index, invariant)

    def project(self, z: Tensor, index: Tensor | None = None, invariant: bool = False) -> Tensor:
        return self.dense().project(z, index, invariant)


def rounded(model: nn.Module) -> None:
    """Write to a model the weights that `Rounded` makes of it."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                down = name.endswith("down_proj")
                weight = Rounded.of(layer, down).dense().weight
                layer.weight.copy_(weight.t() if down else weight)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_weights_of_another_kind_decode_exactly_and_the_figures_count_their_bytes(family):
    model, plain = tiny_model(family, eos_token_id=None), tiny_model(family, eos_token_id=None)
    engine, whole = Engine(model), Engine(tiny_model(family, eos_token_id=None))
    rounded(plain)
    prepare(model, matrix=Rounded.of)
    options = {"max_new_tokens": 24, "sparsity": "coarse"}
    for correction in 1, 4, {"period": 4, "tree_width": 3}:
        done = engine.generate(PROMPT, correction=correction, **options)
        assert list(done.token_ids) == greedy(plain, PROMPT, 24)
    read = [each.generate(PROMPT, correction=1, **options).stats.bytes_per_token for each in (engine, whole)]
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    transposed = [name.endswith("down_proj") for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    saved = [layer.weight.nbytes - Rounded.of(layer, t).nbytes for layer, t in zip(linears, transposed, strict=True)]
    assert read[1] - read[0] == sum(saved)
    restore(model)
    assert list(engine.generate(PROMPT, correction=1, **options).token_ids) == greedy(whole.model, PROMPT, 24)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("int8", r"'str' object is not callable"),
        (lambda layer, transposed: None, r"'NoneType' object has no attribute 'shape'"),
        (lambda layer: dense(layer), r"takes 1 positional argument but 2 were given"),
        (
            lambda layer, transposed: Dense(layer.weight[1:], None),
            r"of \[2, 36\]; got \(35, 36\) and \[2, 35\]",
        ),
    ],
)
def test_what_makes_no_weights_is_refused_and_the_model_decodes_as_before(kind, words):
    model = tiny_model(eos_token_id=None)
    with pytest.raises(ConfigError, match=words):
        prepare(model, matrix=kind)
    assert list(Engine(model).generate(PROMPT, max_new_tokens=9).token_ids) == greedy(model, PROMPT, 9)
