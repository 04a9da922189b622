"""Models that the tests make: a tiny random one of each family, and a toy that needs no transformers at all."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("SIRIUS_TEST_GPU", "")  # none: one device for both sides
os.environ["TRITON_INTERPRET"] = str(int("SIRIUS_TEST_GPU" not in os.environ))  # read when triton is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from sirius import cli
from sirius.core import LanguageModel, Mode, Round, Window
from sirius.decoding.loop import Row, first_round, start
from sirius.engine import Engine
from sirius.runtime.cache import SlotCache

torch.set_num_threads(1)  # the models here are too small to share out

if importlib.util.find_spec("triton"):
    importlib.import_module("sirius.kernels.programs")
del os.environ["TRITON_INTERPRET"]  # what is dispatched to the kernels is not to change with it

SHARED = Path(__file__).parents[2] / "shared"
VOCABULARY, NEURONS = 131, 45

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "olmo2": Olmo2Config,
    "smollm3": SmolLM3Config,
    "phi3": Phi3Config,
}
FAMILIES = list(CONFIGS)


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    """Return the configuration of a two-layer model whose sizes are odd wherever they may be."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # far from uniform scores: no near ties for rounding to decide
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,  # a tied random model says the same token again and again
    }
    return CONFIGS[family](**{**sizes, **changes})


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object):
    """Return a random model of a family, ready to decode; the same arguments give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    return model.to(dtype).eval()


def slow(*values: object):
    """Return a case of a parametrized test that only `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def shape(tmp_path) -> str:
    """The configuration of a tiny Llama, as a file."""
    tiny_config("llama").save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


@pytest.fixture
def sirius_command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run `sirius` with these arguments; gives the exit code and what was printed, out and err."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sirius", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def bench(sirius_command) -> Callable[..., tuple[int, str, str]]:
    """Run `sirius bench` with these arguments."""
    return partial(sirius_command, "bench")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One printable character a token, so that every id of a tiny model has a text."""
    vocabulary = {chr(33 + i) if i < 94 else chr(200 + i): i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="!", clean_up_tokenization_spaces=False)


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int, **options: object) -> list[int]:
    """Return the new tokens of transformers' own greedy decoding."""
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **options
        )
    return out[0, len(prompt) :].tolist()


class Toy:
    """A `LanguageModel` of pure arithmetic: the score of a token is a hash of all tokens before it.

    Its sparse mode disagrees with the dense one at a share `noise` of the nodes. A row's cache is what it holds and a
    window of nodes after that, each a token with the mode that wrote it. What a pass sees is read off its window.
    """

    device = torch.device("cpu")

    def __init__(self, noise: float = 0.5, vocabulary: int = 11) -> None:
        self.noise, self.vocabulary = noise, vocabulary
        self.held: list[list[tuple[int, Mode]]] = []
        self.nodes: list[dict[int, tuple[int, Mode]]] = []
        self.slots: list[int] = []

    def open(self, prompt: Tensor, slots: int) -> Tensor:
        self.held.append([(token, Mode.DENSE) for token in prompt.tolist()])
        self.nodes.append({})
        self.slots.append(slots)
        return self.scores(prompt.tolist(), Mode.DENSE)

    def read(self, tokens: Tensor, mode: Mode, window: Window) -> Tensor:
        assert len(tokens) == len(self.held), f"{len(tokens)} lines for {len(self.held)} rows"
        return torch.stack([self._row(b, line, mode, window) for b, line in enumerate(tokens.tolist())])

    def _row(self, b: int, line: list[int], mode: Mode, window: Window) -> Tensor:
        before = dict(self.nodes[b])
        for node, token in enumerate(line, start=window.first):
            self.nodes[b][node] = (token, mode)
        assert len(self.held[b]) + max(self.nodes[b]) < self.slots[b], "the row has no such slot"
        scores = []
        for t in range(len(line)):
            seen = window.seen[b, t].nonzero()[:, 0].tolist()
            assert seen[-1] == window.first + t and int(window.depths[b, t]) == len(seen) - 1
            branch = [self.nodes[b][node][0] for node in seen]
            scores.append(self.scores([token for token, _ in self.held[b]] + branch, mode))
        for node in range(window.fixed):
            self.nodes[b][node] = before[node]
        return torch.stack(scores)

    def scores(self, tokens: list[int], mode: Mode) -> Tensor:
        digest = hashlib.sha256(repr(tokens).encode()).digest()
        wrong = mode is Mode.SPARSE and digest[31] < 256 * self.noise
        return torch.tensor([float(byte) for byte in (digest[::-1] if wrong else digest)[: self.vocabulary]]) / 32

    def keep(self, path: Tensor, counts: Tensor) -> None:
        for b, count in enumerate(counts.tolist()):
            self.held[b] += [self.nodes[b][node] for node in path[b, :count].tolist()]
            self.nodes[b] = {}

    def rewind(self, count: int) -> None:
        for held, nodes in zip(self.held, self.nodes, strict=True):
            nodes.update(enumerate(held[-count:]))
            del held[-count:]

    def close(self, row: int) -> None:
        for each in (self.held, self.nodes, self.slots):
            each[row] = each[-1]
            each.pop()


def begin(model: LanguageModel, row: Row) -> Round | None:
    """Read a row's prompt and return the round of its first token."""
    return first_round([row], [start(model, row)])[0]


def check_integrity(cache: SlotCache) -> None:
    """Raise AssertionError where the book-keeping and the stored tensors disagree."""
    table = cache.table
    assert table.lengths.shape == (table.rows,), f"{list(table.lengths.shape)} lengths for {table.rows} rows"
    assert bool(((table.lengths >= 0) & (table.lengths <= table.slots)).all()), f"lengths {table.lengths.tolist()}"
    for index, layer in enumerate(cache.slot_layers):
        for store in layer.stores:
            room = store.shape[0] >= table.rows and store.shape[1] >= table.slots
            assert room, f"layer {index} holds {list(store.shape)}"
            for row, length in enumerate(table.lengths.tolist()):
                assert bool(store[row, :length].isfinite().all()), f"layer {index}, row {row} holds no numbers"


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Return an engine of a tiny model whose texts do not end by themselves."""
    return Engine(tiny_model(eos_token_id=None, max_position_embeddings=60))


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[list[int]]:
    """Return what the full model writes after each prompt of `batches`."""
    from batches import NEW, PROMPTS

    return [greedy(engine.model, prompt, NEW) for prompt in PROMPTS]


@pytest.fixture
def gpu_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return where the GPU's kernels run: on the CPU, interpreted, or on the GPU of number SIRIUS_TEST_GPU."""
    if "SIRIUS_TEST_GPU" in os.environ:
        return torch.device("cuda")
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def widened_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: object) -> TensorHandle:
        return dot(builder, widened(a), widened(b), *others)  # it takes the bits of bfloat16 for integers

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened_dot)
    return torch.device("cpu")
