"""The recipe of the embedded model: from nothing to a checkpoint that reasons, on two cores.

Several solved problems are packed to a sequence, so every later one is a few-shot question, and the loss falls on the
answers alone. A run is a function of its `Recipe`: batches are made from the step's number, so a resumed run goes on
exactly where it stopped.

    python runs/train.py FOLDER     about an hour on two cores; an unfinished run in the folder is gone on with
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from random import Random

import torch
import torch.nn.functional as F
from embedded_tokenizer import ASSISTANT, BEGIN, END, PAD, token_id, train_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sirius.cli.terminal import progress, saved_as_it_goes
from sirius.demo.problems import conversation, make_problem
from sirius.errors import ConfigError, FileError

IGNORED = -100  # the label of a token that is read, not learnt


@dataclass(frozen=True)
class Stage:
    """A stretch of training: `steps` batches of `rows` sequences of `length` tokens."""

    steps: int
    rows: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """All that a training run depends on."""

    stages: tuple[Stage, ...] = (Stage(2400, rows=24, length=256), Stage(800, rows=12, length=512))
    reasoning_share: float = 0.8  # of the sequences; the rest is understanding
    peak_lr: float = 2e-3
    muon_lr: float = 2e-2
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    threads: int = 2

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """Return the stage that step number `step` belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step is past the last of {self.steps}")

    def warmth(self, step: int) -> float:
        """Return the share of the peak learning rate at a step: a linear warm-up, then a cosine down to zero."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.steps - self.warmup_steps)))


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step; `loss` is the mean cross-entropy of the batch's answer tokens, in nats."""

    step: int
    steps: int
    loss: float


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Return the untrained model: six Llama blocks of 672 gated neurons, 3.1 M parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=672,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=token_id(tokenizer, PAD),
            bos_token_id=token_id(tokenizer, BEGIN),
            eos_token_id=token_id(tokenizer, END),
        )
    )


def make_batch(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Return the tokens and labels of a step, both [rows, length] int64; label t is token t, or IGNORED."""
    stage = recipe.stage(step)
    rows = [_sequence(tokenizer, recipe, f"{step}.{row}", stage.length) for row in range(stage.rows)]
    tokens, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    return tokens, labels


def _sequence(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, name: str, length: int
) -> tuple[list[int], list[int]]:
    """Pack solved problems of one task until `length` tokens are full; the last one may be cut."""
    rng = Random(f"sequence/{recipe.seed}/{name}")
    task = "reasoning" if rng.random() < recipe.reasoning_share else "understanding"
    begin, assistant, end = (token_id(tokenizer, token) for token in (BEGIN, ASSISTANT, END))
    tokens, labels = [begin], [IGNORED]
    while len(tokens) < length:
        problem = make_problem(task, "train", recipe.seed, rng.getrandbits(60))
        messages = conversation(problem)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False)).removeprefix(BEGIN)
        new: list[int] = tokenizer.encode(text)
        answer_at = new.index(assistant) + 1
        assert new[-1] == end
        tokens += new
        labels += [IGNORED] * answer_at + new[answer_at:]
    return tokens[:length], labels[:length]


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.peak_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    folder: Path, recipe: Recipe, *, on_step: Callable[[Progress], None] = lambda _: None, save_every: int = 20
) -> None:
    """Train by `recipe` and write the model to `folder`; a run that was cut off goes on from `folder/training.pt`."""
    saved = _opened(folder)
    tokenizer = train_tokenizer(seed=recipe.seed)
    model = build_model(tokenizer, recipe.seed)
    optimizers = _optimizers(model, recipe)
    first = _resume(saved, model, optimizers, recipe) if saved.exists() else 0
    with _arithmetic(recipe.threads):
        for step, loss in _steps(model, tokenizer, optimizers, recipe, first):
            on_step(Progress(step + 1, recipe.steps, loss))
            if (step + 1) % save_every == 0:
                _save(saved, model, optimizers, recipe, step + 1)
    tokenizer.save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)
    model.config.dtype = torch.float32  # stored in half the bytes, run in full precision
    model.config.save_pretrained(folder)
    saved.unlink(missing_ok=True)


@contextmanager
def _arithmetic(threads: int) -> Iterator[None]:
    """Compute on `threads` threads; vanishing gradients count as zero, since denormals are six times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _opened(folder: Path) -> Path:
    """Make the folder and return where the run's state goes; a finished model in it is not written over."""
    saved = folder / "training.pt"
    if (folder / "config.json").exists() and not saved.exists():
        raise FileError(f"{folder} holds a finished model; train in another folder, or delete that one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise FileError(f"cannot write to {folder}: {error.strerror}") from error
    return saved


def _steps(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    first: int,
) -> Iterator[tuple[int, float]]:
    model.train()
    for step in range(first, recipe.steps):
        for optimizer, rates in zip(optimizers, (recipe.muon_lr, recipe.peak_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rates * recipe.warmth(step)
        tokens, labels = make_batch(tokenizer, recipe, step)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
            learnt = labels[:, 1:] != IGNORED
            logits = model.lm_head(hidden[learnt])
        loss = F.cross_entropy(logits.float(), labels[:, 1:][learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield step, loss.item()


def _save(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], recipe: Recipe, step: int
) -> None:
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # a cut-off save leaves the last whole one


def _resume(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], recipe: Recipe) -> int:
    try:
        state = torch.load(path, weights_only=True)
        saved_recipe = state["recipe"]
    except (OSError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        raise FileError(f"{path} is no unfinished run of sirius; delete it, or train in another folder") from error
    if saved_recipe != asdict(recipe):
        raise ConfigError(
            f"{path} holds step {state['step']} of another recipe; train in an empty folder, or delete that file"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def main() -> None:
    """Train into the folder that the command names, with a bar of progress."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    folder, recipe = parser.parse_args().folder, Recipe()
    with saved_as_it_goes(), progress("training", recipe.steps) as advance:
        train(folder, recipe, on_step=lambda p: advance(p.step, f"training, loss {p.loss:.3f}"))
    print(f"the model is in {folder}; try it: sirius demo --model {folder}")


if __name__ == "__main__":
    main()
