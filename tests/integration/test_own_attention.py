"""A model whose attention computes something of its mask keeps it: our attention kernel cannot stand for it."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, DogeConfig, PreTrainedModel

from conftest import VOCABULARY, greedy, tiny_model
from sirius.engine import Engine
from sirius.errors import RequestError
from sirius.kernels import cpu

pytestmark = pytest.mark.integration

PROMPTS = [[5, 17, 93, 41, 8], [60, 22]]
SHORT, LONG = 30, 90  # texts within the slots of a mask in our form, and past them


def doge(implementation: str, dtype: torch.dtype = torch.float32, **changes: object):
    config = DogeConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=None,
        tie_word_embeddings=False,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.A)
    return model.to(dtype).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("new", [SHORT, LONG])
@pytest.mark.parametrize("rule", [{"period": 5}, {"period": 4, "tree_width": 3}], ids=["chain", "tree"])
def test_its_texts_are_transformers_own(implementation, new, rule):
    model = doge(implementation)
    wanted = [greedy(model, prompt, new) for prompt in PROMPTS]
    engine = Engine(model)
    for _ in range(2):  # it is known by the second time
        done = dict(engine.generate_many(PROMPTS, max_new_tokens=new, correction=rule))
        assert [list(done[index].token_ids) for index in range(len(PROMPTS))] == wanted
        assert all(each.stats.lossless and each.stats.drafted for each in done.values())


@pytest.mark.skipif(cpu.library() is None, reason="without kernels no attention of ours")
def test_that_it_runs_is_told_once(caplog):
    engine = Engine(doge("sdpa"))
    with caplog.at_level(logging.WARNING, "sirius"):
        for _ in range(2):
            engine.generate(PROMPTS[0], max_new_tokens=SHORT, correction=5)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "the attention of this doge computes something of its mask"
    ]


def test_in_16_bits_its_text_is_not_called_lossless():
    done = Engine(doge("sdpa", torch.bfloat16)).generate(PROMPTS[0], max_new_tokens=SHORT, correction=5)
    assert not done.stats.lossless


def test_a_text_past_the_tokens_that_a_layer_picks_is_refused():
    """Which of equal tokens it picks is chance, in transformers too."""
    with pytest.raises(RequestError, match="pass layer 0's sliding window of 20; set max_new_tokens to at most 15"):
        Engine(doge("sdpa", keep_window_size=20)).generate(PROMPTS[0], max_new_tokens=SHORT)


def with_mask(change) -> PreTrainedModel:
    """Return a model one layer of which takes another mask than it is given."""
    model = tiny_model(eos_token_id=None, attn_implementation="eager")

    def other(module, args, kwargs):
        given = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": given if given is None else change(given)}

    model.model.layers[1].self_attn.register_forward_pre_hook(other, with_kwargs=True)
    return model


def blind(mask):
    """Return a mask of the same form that hides the third token."""
    mask = mask.clone()
    mask[..., 2] = False if mask.dtype is torch.bool else -1e9
    return mask


def test_attention_that_edits_a_copy_of_its_mask_runs_itself():
    model = with_mask(blind)
    want = greedy(model, PROMPTS[0], SHORT)
    assert want != greedy(tiny_model(eos_token_id=None, attn_implementation="eager"), PROMPTS[0], SHORT)
    assert list(Engine(model).generate(PROMPTS[0], max_new_tokens=SHORT, correction=5).token_ids) == want


@pytest.mark.skipif(cpu.library() is None, reason="without kernels no attention of ours")
def test_attention_that_passes_no_mask_on_runs_itself(caplog):
    with caplog.at_level(logging.WARNING, "sirius"):
        Engine(with_mask(lambda mask: None)).generate(PROMPTS[0], max_new_tokens=SHORT, correction=5)
    assert "so its own code runs" in caplog.text
