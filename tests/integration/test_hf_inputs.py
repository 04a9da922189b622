"""What reaches a model's forward besides token ids and a mask is refused by name; what is the default anyway passes."""

import types

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import sirius
from conftest import greedy, tiny_config, tiny_model
from sirius.engine import Engine
from sirius.errors import ConfigError, RequestError, UnsupportedModelError

pytestmark = pytest.mark.integration

PROMPT, NEW = [5, 17, 93, 41, 8], 20
IDS = torch.tensor([PROMPT])
MASK = torch.tensor([[0, 0, 1, 1], [1] * 4])
PADDED = {"input_ids": torch.tensor([[0, 0, 60, 22], [7, 8, 9, 10]]), "attention_mask": MASK}


@pytest.fixture
def model():
    return tiny_model(eos_token_id=None)


def ours(model, *args, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(*args, custom_generate=sirius.decode, correction=5, **options)


@pytest.mark.parametrize(
    "positions",
    [3 * torch.arange(5)[None], torch.arange(1, 6)[None], torch.zeros(1, 5, dtype=torch.int64), torch.arange(9)[None]],
    ids=["stretched", "shifted", "all zero", "too many"],
)
def test_other_positions_are_refused(model, positions):
    with pytest.raises(RequestError, match="position_ids are not those of the tokens one after the other"):
        ours(model, IDS, position_ids=positions)


def test_the_positions_that_tokens_have_anyway_pass(model):
    assert torch.equal(ours(model, IDS, position_ids=torch.arange(5)[None]), ours(model, IDS))
    for filler in 0, 1:  # what padding gets is no matter
        positions = (PADDED["attention_mask"].cumsum(-1) - 1).masked_fill(PADDED["attention_mask"] == 0, filler)
        own = model.generate(**PADDED, position_ids=positions, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(ours(model, **PADDED, position_ids=positions), own)


def test_a_mask_with_other_numbers_is_refused(model):
    with pytest.raises(RequestError, match="marks tokens with 1 and padding with 0"):
        ours(model, IDS, attention_mask=torch.tensor([[1, 1, 2, 2, 2]]))


def test_a_pad_token_within_a_prompt_is_refused_with_the_way_out():
    model = tiny_model(eos_token_id=None)
    with pytest.raises(RequestError, match="give an attention_mask where a prompt's own token was taken for padding"):
        ours(model, torch.tensor([[5, 0, 93, 41]]), pad_token_id=0)
    given = {"attention_mask": torch.ones(1, 4, dtype=torch.int64), "pad_token_id": 0}
    ids = torch.tensor([[5, 0, 93, 41]])
    want = model.generate(ids, **given, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours(model, ids, **given), want)


@pytest.fixture(scope="module")
def llava():
    text = tiny_config("llama", eos_token_id=None)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model", "projection_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(
            text_config=text.to_dict(), vision_config=vision, image_token_id=130, vision_feature_layer=-1
        )
        return LlavaForConditionalGeneration(config).eval()


def test_images_are_refused_and_text_alone_is_not(llava):
    ids = torch.tensor([[5, *[130] * 4, 8]])
    with pytest.raises(RequestError, match=r"pixel_values .* would have no effect.*model\.generate alone"):
        ours(llava, ids, pixel_values=torch.randn(1, 3, 8, 8))
    own = llava.generate(IDS, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ours(llava, IDS), own)


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_token_types_of_text_pass_and_others_do_not(model, name):
    job = {
        "logits_processor": None,
        "stopping_criteria": [],
        "generation_config": model._prepare_generation_config(None, max_length=12, do_sample=False)[0],
        "correction": 5,
    }
    sirius.decode(model, IDS, **job, **{name: torch.zeros_like(IDS)})
    with pytest.raises(RequestError, match=f"{name} would have no effect"):
        sirius.decode(model, IDS, **job, **{name: torch.ones_like(IDS)})


class Stretched(type(tiny_model())):
    """Prepares positions of its own."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        found = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**found, "position_ids": 3 * found["position_ids"]}


class Usual(type(tiny_model())):
    """Prepares what transformers does, in code of its own."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs)


class Late(type(tiny_model())):
    """Prepares something else from the second step on."""

    def prepare_inputs_for_generation(self, *args, is_first_iteration=False, **kwargs):
        found = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return found if is_first_iteration else {**found, "bias": torch.ones(3)}


@pytest.mark.parametrize("kind", [Stretched, Late])
def test_a_model_that_prepares_other_inputs_is_refused(kind):
    model = kind(tiny_config("llama", eos_token_id=None)).eval()
    for use in (lambda: ours(model, IDS), lambda: Engine(model)):
        with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} has a prepare_inputs_for_"):
            use()
    assert not sirius.model.prepare.sparse_mlps(model)


class Counting(type(tiny_model())):
    """Hands something on from step to step."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **options):
        return super()._update_model_kwargs_for_generation(outputs, {**model_kwargs, "bias": 1}, **options)


def test_a_model_that_hands_inputs_on_itself_is_refused():
    with pytest.raises(UnsupportedModelError, match="_update_model_kwargs_for_generation of its own"):
        Engine(Counting(tiny_config("llama")).eval())


def test_a_model_that_prepares_the_usual_inputs_itself_passes():
    model = Usual(tiny_config("llama", eos_token_id=None)).eval()
    assert ours(model, IDS)[0, 5:].tolist() == greedy(model, PROMPT, NEW)


def test_prompts_that_are_put_in_by_a_wrapper_are_refused(model):
    """As prompt tuning does: it hangs its own function on the model that it wraps, for the time of `generate`."""
    sirius.prepare(model)

    def prepare(self, input_ids, *args, **kwargs):
        return {"inputs_embeds": self.get_input_embeddings()(input_ids), **kwargs}

    model.prepare_inputs_for_generation = types.MethodType(prepare, model)
    with pytest.raises(UnsupportedModelError, match="input_ids are others"):
        ours(model, IDS)


def test_argmax_beside_sampling_is_refused_in_transformers_words(model):
    with pytest.raises(ConfigError, match="do_sample=False"):
        model.generate(
            IDS, do_sample=True, max_new_tokens=3, custom_generate=sirius.decode, correction={"accept": "argmax"}
        )
