"""The recipe, on a few small steps: the same from run to run, and after an interruption."""

import pytest
import torch
import train as recipe_module
from embedded_tokenizer import ASSISTANT, BEGIN, END, PAD, token_id, train_tokenizer
from train import IGNORED, Recipe, Stage, make_batch, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conftest import tiny_config
from sirius.demo.problems import final_answer
from sirius.errors import ConfigError, FileError

pytestmark = pytest.mark.integration

SMALL = Recipe(stages=(Stage(3, rows=2, length=48), Stage(2, rows=1, length=64)), warmup_steps=2, threads=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(problems=300)


@pytest.fixture(autouse=True)
def small_model(monkeypatch, tokenizer):
    names = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
    ids = {name: token_id(tokenizer, token) for name, token in names.items()}
    config = tiny_config("llama", vocab_size=len(tokenizer), tie_word_embeddings=True, **ids)

    def build_model(tokenizer, seed):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)

    monkeypatch.setattr(recipe_module, "train_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(recipe_module, "build_model", build_model)


class Interrupted(Exception):
    pass


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    losses = []
    train(tmp_path / "whole", SMALL, on_step=lambda p: losses.append(p.loss))

    def interrupt(progress):
        if progress.step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path / "broken", SMALL, on_step=interrupt, save_every=2)
    resumed = []
    train(tmp_path / "broken", SMALL, on_step=resumed.append, save_every=2)
    assert [p.step for p in resumed] == [3, 4, 5]
    assert [p.loss for p in resumed] == losses[2:]
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not list(tmp_path.rglob("training.*"))


def test_a_finished_model_is_an_ordinary_folder_in_full_precision(tmp_path):
    train(tmp_path, SMALL)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template and tokenizer.eos_token == END


def test_another_recipe_does_not_go_on_with_this_ones_run(tmp_path):
    def interrupt(progress):
        if progress.step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path, SMALL, on_step=interrupt, save_every=1)
    with pytest.raises(ConfigError, match="another recipe"):
        train(tmp_path, Recipe(stages=SMALL.stages, seed=1))


def test_the_loss_falls_on_answers_alone(tokenizer):
    tokens, labels = make_batch(tokenizer, Recipe(stages=(Stage(1, rows=4, length=400),)), 0)
    assert tokens.shape == labels.shape == (4, 400)
    learnt = labels != IGNORED
    assert torch.equal(labels[learnt], tokens[learnt])
    text = tokenizer.decode(tokens[0][learnt[0]])
    answers = text.split(END)[:-1]
    assert len(answers) >= 2 and all(final_answer(answer) for answer in answers)
    assistant = token_id(tokenizer, ASSISTANT)
    starts = (tokens[:, :-1] == assistant) & ~learnt[:, :-1]
    assert bool(learnt[:, 1:][starts].all())


def test_batches_differ_from_step_to_step_and_not_from_run_to_run(tokenizer):
    first, again, second = (make_batch(tokenizer, SMALL, step)[0] for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert make_batch(tokenizer, SMALL, 3)[0].shape == (1, 64)


def test_the_learning_rate_rises_and_falls():
    recipe = Recipe(stages=(Stage(100, 1, 1),), warmup_steps=10)
    rates = [recipe.warmth(step) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.01


def test_digits_are_tokens_of_their_own_and_any_text_survives(tokenizer):
    ids = tokenizer("12 + 345 = 357").input_ids
    assert [tokenizer.decode([i]).strip() for i in ids if tokenizer.decode([i]).strip().isdigit()] == list("12345357")
    for text in ("Zoë → 日本 🙂", "  two  spaces\n\ttab"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "training.pt").write_text("not a run")
    for name, says in (("file", "cannot write to"), ("done", "finished model"), ("odd", "no unfinished run")):
        with pytest.raises(FileError, match=says):
            train(tmp_path / name, SMALL)


def test_training_leaves_the_process_as_it_was(tmp_path):
    threads, smallest = torch.get_num_threads(), torch.tensor(1e-310, dtype=torch.float64)
    train(tmp_path, SMALL)
    assert torch.get_num_threads() == threads
    assert float(smallest * 1.0) > 0, "denormals are still flushed"
