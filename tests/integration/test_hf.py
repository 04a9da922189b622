"""`model.generate(..., custom_generate=sirius.decode)` keeps transformers' conventions."""

from functools import partial

import pytest
import torch
from transformers import StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

import sirius
from conftest import greedy, tiny_model
from sirius.errors import ConfigError, RequestError
from sirius.model.inputs import cache_argument
from sirius.model.prepare import sparse_mlps

pytestmark = pytest.mark.integration

PROMPTS = [[5, 17, 93, 41, 8], [60, 22], [7, 8, 9, 10, 11, 12, 13]]
NEW = 30
EXACT = {"accept": "argmax", "period": 7}
TREE = {**EXACT, "tree_width": 4}
SAMPLED = {"accept": "sampling", "period": 4}


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1


@pytest.fixture
def model():
    return tiny_model(eos_token_id=None)


def left_padded(prompts: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def both(model, inputs: dict, correction: dict = EXACT, **options):
    """Return transformers' own greedy output and ours, of the same call."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    own = model.generate(**inputs, **options)
    return own, model.generate(**inputs, **options, custom_generate=sirius.decode, correction=correction)


def sampled(model, inputs: dict, seed: int = 0, correction: object = SAMPLED, **options):
    """Return what `generate` samples our way under a seed of torch."""
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.9, "top_k": 20, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(**inputs, **options, custom_generate=sirius.decode, correction=correction)


@pytest.mark.parametrize("sparsity", ["coarse", {"method": "fine", "keep": 0.2}, sirius.SparsityConfig("none")])
def test_a_single_prompt_equals_transformers_greedy_decoding(model, sparsity):
    want = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=NEW, do_sample=False)
    got = model.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=NEW,
        do_sample=False,
        custom_generate=sirius.decode,
        sparsity=sparsity,
        correction=EXACT,
    )
    assert torch.equal(want, got)


@pytest.mark.parametrize("correction", [EXACT, TREE], ids=["chain", "tree"])
def test_a_left_padded_batch_gives_each_row_its_text_alone(model, correction):
    inputs = left_padded(PROMPTS)
    own, ours = both(model, inputs, correction)
    assert torch.equal(own, ours)
    longest = max(map(len, PROMPTS))
    for row, prompt in zip(ours, PROMPTS, strict=True):
        assert row[longest:].tolist() == greedy(model, prompt, NEW)


def test_rows_that_end_early_are_padded_on_the_right():
    free = greedy(tiny_model(eos_token_id=None), PROMPTS[0], NEW)
    model = tiny_model(eos_token_id=free[6])
    own, ours = both(model, left_padded(PROMPTS), pad_token_id=0)
    assert torch.equal(own, ours)
    assert (ours[0, -1] == 0) and free[6] in ours[0].tolist()


def test_a_missing_mask_is_a_mask_of_ones(model):
    got = sirius.decode(
        model,
        torch.tensor([PROMPTS[0]]),
        logits_processor=None,
        stopping_criteria=StoppingCriteriaList(),
        generation_config=_config(model, max_length=len(PROMPTS[0]) + 5),
        attention_mask=None,
        correction=EXACT,
    )
    assert got[0, len(PROMPTS[0]) :].tolist() == greedy(model, PROMPTS[0], 5)


def _config(model, **changes):
    config = model.generation_config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_the_output_is_transformers_with_our_figures(model):
    own, ours = both(model, left_padded(PROMPTS), return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert torch.equal(own.sequences, ours.sequences)
    assert len(ours.scores) == len(own.scores) == NEW
    for mine, theirs in zip((*ours.scores, *ours.logits), (*own.scores, *own.logits), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert [s.tokens for s in ours.stats] == [NEW] * 3 and all(s.lossless and s.period == 7 for s in ours.stats)


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 20}, {"suppress_tokens": [9, 90]}],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("correction", [EXACT, TREE], ids=["chain", "tree"])
def test_logits_processors_act_on_draft_and_full_model(options, correction):
    model = tiny_model(eos_token_id=greedy(tiny_model(eos_token_id=None), PROMPTS[0], NEW)[3])
    own, ours = both(model, left_padded(PROMPTS), correction, pad_token_id=0, **options)
    assert torch.equal(own, ours)


def test_stopping_criteria_are_asked_after_every_token(model):
    asked = []

    def third_even(ids, scores, **kwargs):
        asked.append(ids.shape[1])
        return torch.tensor([(ids[0, len(PROMPTS[0]) :] % 2 == 0).sum() >= 3])

    inputs = {"input_ids": torch.tensor([PROMPTS[0]])}
    own, ours = both(model, inputs, stopping_criteria=StoppingCriteriaList([third_even]))
    assert torch.equal(own, ours)
    half = len(asked) // 2
    assert asked[:half] == asked[half:] == list(range(len(PROMPTS[0]) + 1, ours.shape[1] + 1))


@pytest.mark.parametrize("at", [2, 9, 17])
def test_stop_strings_end_where_transformers_ends(model, tokenizer, at):
    text = tokenizer.decode(greedy(model, PROMPTS[0], NEW))
    inputs, stops = {"input_ids": torch.tensor([PROMPTS[0]])}, [text[at : at + 2]]
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_strings": stops, "tokenizer": tokenizer}
    own = model.generate(**inputs, **options)
    ours = sirius.generate(model, **inputs, **options, correction=EXACT)
    assert torch.equal(own, ours)


def test_a_streamer_gets_the_prompt_then_flat_tokens_then_the_end(model):
    recorder = Recorder()
    ids = torch.tensor([PROMPTS[0]])
    ours = sirius.generate(model, ids, streamer=recorder, max_new_tokens=NEW, do_sample=False, correction=EXACT)
    assert torch.equal(recorder.puts[0], ids) and recorder.ended == 1
    assert all(put.ndim == 1 for put in recorder.puts[1:])
    assert torch.cat(recorder.puts[1:]).tolist() == ours[0, len(PROMPTS[0]) :].tolist()


def test_transformers_text_streamer_prints_the_text(model, tokenizer, capsys):
    ids = torch.tensor([PROMPTS[0]])
    bound = partial(sirius.decode, streamer=TextStreamer(tokenizer, skip_prompt=True))
    ours = model.generate(ids, custom_generate=bound, max_new_tokens=NEW, do_sample=False)
    assert capsys.readouterr().out.strip() == tokenizer.decode(ours[0, len(PROMPTS[0]) :])


def test_between_calls_the_model_is_the_ordinary_one(model):
    want = greedy(model, PROMPTS[0], NEW)
    model.generate(torch.tensor([PROMPTS[0]]), custom_generate=sirius.decode, max_new_tokens=NEW, do_sample=False)
    assert sparse_mlps(model)
    assert greedy(model, PROMPTS[0], NEW) == want
    sirius.restore(model)
    assert not sparse_mlps(model)
    assert greedy(model, PROMPTS[0], NEW) == want


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"do_sample": True, "correction": EXACT}, ConfigError, "accept 'argmax' is for greedy text"),
        ({"num_beams": 3}, ConfigError, "num_beams"),
        ({"num_beams": 3, "do_sample": True}, ConfigError, "num_beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, ConfigError, "contrastive search"),
        ({"dola_layers": "high"}, ConfigError, "dola generation"),
        ({"prompt_lookup_num_tokens": 3}, ConfigError, "assisted generation"),
        ({"guidance_scale": 1.5}, ConfigError, "guidance_scale=1"),
        ({"return_dict_in_generate": True, "output_attentions": True}, ConfigError, "output_attentions"),
        ({"sparsity": "dense"}, ConfigError, "known are"),
        ({"sparsity": {"keeps": 0.5}}, ConfigError, "method, keep, threshold"),
        ({"correction": {"period": 0}}, ConfigError, "at least 1"),
        ({"streamer": Recorder()}, ConfigError, "one prompt at a time; got 3"),
        ({"stop_strings": ["x"]}, ConfigError, "tokenizer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_honoured_is_refused(model, options, error, says):
    with pytest.raises(error, match=says):
        sirius.generate(model, **left_padded(PROMPTS), max_new_tokens=5, **{"do_sample": False, **options})


def test_a_filled_cache_and_embeddings_are_refused(model):
    ids = torch.tensor([PROMPTS[0]])
    name = cache_argument(model)
    cache = model(ids, use_cache=True)[name]
    options = {"custom_generate": sirius.decode, "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(RequestError, match=f"no {name}"):
        model.generate(torch.tensor([[*PROMPTS[0], 9]]), **{name: cache}, **options)
    with pytest.raises(RequestError, match="inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids).detach(), **options)


def test_padding_on_the_right_is_refused(model):
    inputs = {name: value.flip(1) for name, value in left_padded(PROMPTS).items()}
    with pytest.raises(RequestError, match=r"row 0 is padded on the right.*padding_side='left'"):
        sirius.generate(model, **inputs, max_new_tokens=5, do_sample=False)


def test_a_row_of_padding_alone_is_refused(model):
    inputs = left_padded(PROMPTS)
    inputs["attention_mask"][1] = 0
    with pytest.raises(RequestError, match="all padding"):
        sirius.generate(model, **inputs, max_new_tokens=5, do_sample=False)


def test_a_sliding_window_shorter_than_the_text_is_refused():
    model = tiny_model("mistral", sliding_window=12)
    with pytest.raises(RequestError, match=r"prompt 5 \+ 30 new tokens pass layer 0's sliding window of 12.*at most 7"):
        sirius.generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=NEW, do_sample=False)


def test_the_model_and_the_output_can_be_trained_with_afterwards(model):
    out = sirius.generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=5, do_sample=False)
    assert not out.is_inference()
    model(out, labels=out).loss.backward()
    gradients = [mlp.down_proj.weight.grad for mlp in sparse_mlps(model)]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_the_first_end_token_pads_where_no_pad_token_is_set():
    free = greedy(tiny_model(eos_token_id=None), PROMPTS[0], NEW)
    ends = [max(free[3], 3), 3]
    model = tiny_model(eos_token_id=ends, pad_token_id=None)
    own, ours = both(model, left_padded(PROMPTS))
    assert torch.equal(own, ours) and (ours[0, -1] == ends[0])


@pytest.mark.parametrize("correction", [EXACT, TREE], ids=["chain", "tree"])
def test_scores_and_logits_beside_a_processor_are_those_of_transformers(model, correction):
    raw = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.7}
    own, ours = both(model, left_padded(PROMPTS), correction, **raw)
    assert torch.equal(own.sequences, ours.sequences)
    for name in ("scores", "logits"):
        for mine, theirs in zip(ours[name], own[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.scores[0], ours.logits[0], atol=0.1), "the processor changed nothing"


def test_sampling_is_reproducible_under_torch_s_seed(model):
    inputs = left_padded(PROMPTS)
    first = sampled(model, inputs)
    assert torch.equal(sampled(model, inputs), first)
    assert not torch.equal(sampled(model, inputs, seed=1), first)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False), first)


def test_rows_of_the_same_prompt_are_sampled_apart(model):
    rows = sampled(model, left_padded([PROMPTS[0]] * 4)).tolist()
    assert len({tuple(row) for row in rows}) == 4


@pytest.mark.parametrize("sparsity", ["coarse", {"method": "fine", "keep": 0.2}])
def test_a_sample_is_the_same_whatever_is_drafted(model, sparsity):
    inputs = left_padded(PROMPTS)
    want = sampled(model, inputs, sparsity="none")
    corrections = 0
    for period in (1, 2, 9, "auto"):
        for width in (1, 4):
            correction = {**SAMPLED, "period": period, "tree_width": width}
            got = sampled(model, inputs, correction=correction, sparsity=sparsity, return_dict_in_generate=True)
            assert torch.equal(got.sequences, want), correction
            assert all(s.lossless for s in got.stats)
            corrections += sum(s.corrections for s in got.stats)
    assert corrections, "a draft that is always right shows nothing"


FALSE_ALARM = 1e-6  # the chance that right code fails the chi-square test, were torch's seed drawn anew


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
def test_the_first_tokens_have_the_distribution_of_the_full_model(width):
    """The first one comes with the prompt, the second one is drafted and checked."""
    vocabulary, rows, heat, prompt = 7, 600, 0.5, [1, 2, 3]
    model = tiny_model(vocab_size=7, initializer_range=0.2, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    options = {"temperature": heat, "top_k": 5, "max_new_tokens": 4, "sparsity": {"method": "fine", "keep": 0.1}}
    correction = {**SAMPLED, "tree_width": width}
    drawn = sampled(model, left_padded([prompt] * rows), correction=correction, **options)[:, 3:5]
    counts = (drawn @ torch.tensor([vocabulary, 1])).bincount(minlength=vocabulary**2).double()
    assert chance(counts, rows * exact_pairs(model, prompt, vocabulary, heat, top=5)) > FALSE_ALARM
    assert chance(counts, rows * exact_pairs(model, prompt, vocabulary, 1.0, top=5)) < FALSE_ALARM, "too few rows"


def exact_pairs(model, prompt: list[int], vocabulary: int, heat: float, top: int) -> torch.Tensor:
    """Return the full model's probability of each pair of first tokens, [V * V] float64."""
    ids = torch.tensor([[*prompt, token] for token in range(vocabulary)])
    with torch.inference_mode():
        scores = model(ids).logits[:, -2:].double() / heat
    scores = scores.masked_fill(scores < scores.topk(top).values[..., -1:], -torch.inf)
    return (scores[0, 0].softmax(-1)[:, None] * scores[:, 1].softmax(-1)).flatten()


def chance(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Return Pearson's probability of counts at least this far from the expected ones; rare ones go together."""
    assert not counts[expected == 0].any(), "a token that top_k leaves out"
    rare = expected < 5
    counts, expected = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (counts, expected))
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))
