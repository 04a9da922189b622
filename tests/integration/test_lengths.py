"""Texts end where the model does: at a sliding window, at the context, and where positions are scaled anew."""

import pytest
import torch

from conftest import greedy, tiny_model
from sirius import CorrectionConfig, decode
from sirius.engine import Engine
from sirius.errors import ConfigError, RequestError
from sirius.model.limits import context_limit
from sirius.model.prepare import sparse_mlps

pytestmark = pytest.mark.integration


def test_a_window_that_slides_is_never_passed():
    engine = Engine(tiny_model("mistral", sliding_window=16, eos_token_id=None))
    assert len(engine.generate([3] * 10, max_new_tokens=6).token_ids) == 6
    assert len(engine.generate([3] * 10).token_ids) == 6
    with pytest.raises(
        RequestError, match=r"prompt 10 \+ 7 new tokens pass layer 0's sliding window of 16; .* at most 6$"
    ):
        engine.generate([3] * 10, max_new_tokens=7)
    with pytest.raises(
        RequestError, match=r"prompt 16 \+ 1 new tokens pass layer 0's sliding window of 16; shorten the prompt"
    ):
        engine.generate([3] * 16)


def test_a_context_is_never_passed():
    engine = Engine(tiny_model(max_position_embeddings=20, eos_token_id=None))
    assert len(engine.generate([3] * 10).token_ids) == 10
    with pytest.raises(RequestError, match=r"prompt 10 \+ max_new_tokens 11 = 21 .* limit of 20; .* at most 10, or"):
        engine.generate([3] * 10, max_new_tokens=11)
    with pytest.raises(RequestError, match=r"the prompt has 20 tokens and the model's context holds 20"):
        engine.generate([3] * 20)


@pytest.fixture
def turning() -> Engine:
    """A model whose positions are scaled in another way from 24 tokens on."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [3.0] * 3}
    sizes = {"max_position_embeddings": 100, "original_max_position_embeddings": 24}
    return Engine(tiny_model("phi3", eos_token_id=None, rope_parameters=rope, **sizes))


def test_no_text_goes_on_where_positions_are_scaled_anew(turning):
    for prompt, new in ([3] * 10, 14), ([3, 4] * 15, 20):
        done = turning.generate(prompt, max_new_tokens=new, correction=CorrectionConfig(5, "argmax"))
        assert list(done.token_ids) == greedy(turning.model, prompt, new)
    with pytest.raises(RequestError, match=r"prompt 10 \+ 15 new tokens pass the 24 .* at most 14"):
        turning.generate([3] * 10, max_new_tokens=15)
    with pytest.raises(RequestError, match=r"prompt 24 .* lengthen the prompt by a token"):
        turning.generate([3] * 24)


def test_texts_on_both_sides_of_it_do_not_share_a_batch(turning):
    options = {"batch_size": 3, "max_new_tokens": 9, "correction": CorrectionConfig(5, "argmax")}
    done = dict(turning.generate_many([[3] * 10, [3, 4] * 15, [5] * 4], **options))
    assert isinstance(done[1], RequestError) and "other side of the 24" in str(done[1])
    assert list(done[0].token_ids) == greedy(turning.model, [3] * 10, 9) and done[2].token_ids


def test_dynamic_positions_end_with_the_context():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(eos_token_id=None, rope_parameters=rope, max_position_embeddings=24)
    Engine(model)
    with pytest.raises(RequestError, match="pass the 24"):
        model.generate(torch.tensor([[3] * 10]), max_new_tokens=20, custom_generate=decode, do_sample=False)


@pytest.mark.parametrize("prompt", [24, 25, 40])
def test_no_text_begins_where_each_token_scales_positions_anew(prompt):
    """transformers' own text differs there with every pass of several tokens."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny_model(eos_token_id=None, rope_parameters=rope, max_position_embeddings=24)
    assert context_limit(model.config) == 96
    for call in (
        lambda: Engine(model).generate([3] * prompt),
        lambda: model.generate(torch.tensor([[3] * prompt]), max_new_tokens=2, custom_generate=decode),
    ):
        with pytest.raises(RequestError, match=rf"prompt {prompt} .* pass the 24 .* shorten the prompt"):
            call()


def scaled(**rope: object) -> dict[str, object]:
    return {"rope_theta": 1e4, **rope}


LIMITS = {
    "none": ("llama", {}, 32),
    "linear": ("llama", {"rope_parameters": scaled(rope_type="linear", factor=4.0)}, 128),
    "by its old name": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, 128),
    "yarn": ("llama", {"rope_parameters": scaled(rope_type="yarn", factor=4.0)}, 128),
    "yarn, scaled already": (
        "llama",
        {"rope_parameters": scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)},
        32,
    ),
    "yarn, from more": (
        "llama",
        {"rope_parameters": scaled(rope_type="yarn", factor=2.0, original_max_position_embeddings=20)},
        40,
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": scaled(
                rope_type="llama3",
                factor=8.0,
                original_max_position_embeddings=16,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            )
        },
        32,
    ),
    "gemma3": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 32),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LIMITS)
def test_the_context_is_what_positions_are_scaled_to(case):
    family, changes, limit = LIMITS[case]
    options = {"sliding_window": 500} if family == "gemma3" else {}
    model = tiny_model(family, eos_token_id=None, max_position_embeddings=32, **options, **changes)
    engine = Engine(model)
    assert engine.room([3] * 10) == limit - 10
    if limit > 42:
        done = engine.generate([3, 7, 9] * 14, max_new_tokens=20, correction=CorrectionConfig(5, "argmax"))
        assert list(done.token_ids) == greedy(model, [3, 7, 9] * 14, 20)
    with pytest.raises(RequestError, match=f"context holds {limit}.* max_context to {limit + 1} or more"):
        engine.room([3] * limit)


def test_a_context_may_be_set_larger_or_smaller_than_the_models_own():
    model = tiny_model(max_position_embeddings=20, eos_token_id=None)
    done = Engine(model, max_context=50).generate([3] * 30, max_new_tokens=20)
    assert list(done.token_ids) == greedy(model, [3] * 30, 20)
    with pytest.raises(RequestError, match=r"= 51 tokens pass the limit of 50; set .* or raise max_context"):
        Engine(model, max_context=50).generate([3] * 30, max_new_tokens=21)
    assert Engine(model, max_context=12).room([3] * 10) == 2


@pytest.mark.parametrize("limit", [1, -5, True, 20.0, "20"])
def test_a_context_of_no_tokens_is_refused_before_anything_is_done(limit):
    model = tiny_model()
    with pytest.raises(ConfigError, match="max_context counts tokens"):
        Engine(model, max_context=limit)
    assert not sparse_mlps(model)
