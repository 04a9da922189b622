"""Models that the tests make: a tiny random one of each family, and a toy that needs no transformers at all."""

import hashlib
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one device for both sides of a comparison
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
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
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from sirius.core import Mode

torch.set_num_threads(1)  # the models here are too small to share out

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


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int, **options: object) -> list[int]:
    """Return the new tokens of transformers' own greedy decoding."""
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **options
        )
    return out[0, len(prompt) :].tolist()


class Toy:
    """A `LanguageModel` of pure arithmetic: the score of a token is a hash of all tokens before it.

    Its sparse mode disagrees with the dense one at a share `noise` of the places. Its cache is the list of tokens, each
    with the mode that wrote it.
    """

    def __init__(self, noise: float = 0.5, vocabulary: int = 11) -> None:
        self.noise, self.vocabulary = noise, vocabulary
        self.slots: list[tuple[int, Mode]] = []
        self.selected = 0

    def read(self, tokens: Tensor, mode: Mode, last: int | None = None) -> Tensor:
        rows = []
        for token in tokens[0].tolist():
            self.slots.append((token, mode))
            rows.append(self.scores([t for t, _ in self.slots], mode))
        return torch.stack(rows)[None, -(last or len(rows)) :]

    def scores(self, tokens: list[int], mode: Mode) -> Tensor:
        digest = hashlib.sha256(repr(tokens).encode()).digest()
        wrong = mode is Mode.SPARSE and digest[31] < 256 * self.noise
        return torch.tensor([float(byte) for byte in (digest[::-1] if wrong else digest)[: self.vocabulary]])

    def select(self) -> None:
        self.selected += 1

    def truncate(self, lengths: Tensor) -> None:
        assert int(lengths) <= len(self.slots), "a cache cannot be cut to more than it holds"
        del self.slots[int(lengths) :]
