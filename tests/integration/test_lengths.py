"""Texts end where the model does: at a sliding window, at the context, and where positions are scaled anew."""

import pytest
import torch

from conftest import greedy, tiny_model
from sirius import CorrectionConfig, decode
from sirius.engine import Engine
from sirius.errors import RequestError

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
    with pytest.raises(RequestError, match=r"prompt 10 \+ max_new_tokens 11 = 21 .* limit of 20; .* at most 10$"):
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
