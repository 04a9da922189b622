"""With a temperature the text is a sample of the full model's, the one its seed gives, whatever is drafted."""

from functools import cache
from itertools import product

import pytest
import torch

from conftest import slow, tiny_model
from sirius.core import CorrectionConfig, SamplingConfig, SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError

pytestmark = pytest.mark.integration

PROMPT = [5, 17, 93, 41, 8, 60, 22]
PROMPTS = [PROMPT, [9, 9], [70, 3, 12, 88, 41, 6, 19, 101, 55, 20, 33]]
NEW = 28
SAMPLINGS = {
    "temperature alone": SamplingConfig(0.8, seed=3),
    "every processor": SamplingConfig(1.3, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=3),
}
CORRECTIONS = {
    "chain": CorrectionConfig(5, "sampling"),
    "tree": CorrectionConfig(5, "sampling", tree_width=4),
}
EACH_PAIR = [(1, "coarse", "every processor"), (1, "fine", "temperature alone")]
EACH_PAIR += [(4, "coarse", "temperature alone"), (4, "fine", "every processor")]
DRAFTS = [  # of width, method and sampling each two meet; all three do in the slow tier
    case if case in EACH_PAIR else slow(*case) for case in product((1, 4), ("coarse", "fine"), SAMPLINGS)
]
GREEDY = {
    "chain": CorrectionConfig(5, "argmax"),
    "tree": CorrectionConfig(5, "argmax", tree_width=4),
}


def sampling(period: int | str, width: int = 1) -> CorrectionConfig:
    return CorrectionConfig(period, "sampling", tree_width=width)


@cache
def engine() -> Engine:
    return Engine(tiny_model(dtype=torch.float64, eos_token_id=None))


def decoded(correction: CorrectionConfig = CORRECTIONS["chain"], sparsity="fine", chosen: object = 1.0, new=NEW):
    """Return one text of PROMPT at keep 0.3, or of the full model alone where the sparsity is "none"."""
    sparse = SparsityConfig(sparsity, 0.3 if sparsity != "none" else 1.0)
    return engine().generate(PROMPT, max_new_tokens=new, sparsity=sparse, correction=correction, sampling=chosen)


@cache
def full_model_scores(tokens: tuple[int, ...]) -> torch.Tensor:
    """Return the scores [new, V] of each new token after PROMPT, from one fresh pass of the full model."""
    with torch.inference_mode():
        return engine().model(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1]


@pytest.mark.parametrize(("width", "sparsity", "name"), DRAFTS)
def test_a_seed_gives_the_text_that_it_gives_without_a_draft(width, sparsity, name):
    chosen = SAMPLINGS[name]
    want = decoded(sparsity="none", chosen=chosen)
    assert want.stats.drafted == 0
    accepted = corrections = 0
    for period in (2, 16, "auto"):
        got = decoded(sampling(period, width), sparsity, chosen)
        assert got.token_ids == want.token_ids, f"period {period}"
        accepted, corrections = accepted + got.stats.accepted, corrections + got.stats.corrections
    assert accepted and corrections, "a draft that is always right or always wrong shows nothing"


@pytest.mark.parametrize(("width", "sparsity", "name"), DRAFTS)
def test_a_seed_gives_it_among_other_prompts_too(width, sparsity, name):
    options = {"max_new_tokens": NEW, "sampling": SAMPLINGS[name]}
    want = {i: engine().generate(p, **options, sparsity="none").token_ids for i, p in enumerate(PROMPTS)}
    for period, rows in ((2, 3), (7, 2)):
        shared = {"sparsity": SparsityConfig(sparsity, 0.3), "correction": sampling(period, width)}
        done = engine().generate_many(PROMPTS, batch_size=rows, **options, **shared)
        assert {index: got.token_ids for index, got in done} == want, f"period {period}, {rows} rows"


def test_each_text_of_a_batch_keeps_its_own_seed_and_temperature():
    asked = [SamplingConfig(1.0, seed=1), SamplingConfig(), SamplingConfig(1.0, seed=2), SamplingConfig(0.6, seed=1)]
    batch = engine().batch(rows=4, sparsity=SparsityConfig("fine", 0.3), correction=CORRECTIONS["tree"])
    tickets = [batch.add(engine().text(PROMPT, max_new_tokens=NEW, sampling=each)) for each in asked]
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step()}
    texts = [done[ticket].token_ids for ticket in tickets]
    assert texts == [decoded(sparsity="none", chosen=each).token_ids for each in asked]
    assert len(set(texts)) == 4


def test_another_seed_gives_another_text():
    assert len({decoded(chosen=SamplingConfig(1.0, seed=seed)).token_ids for seed in range(5)}) == 5


@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)
def test_without_a_seed_torch_s_generator_decides(correction):
    def two_texts(seed: int) -> list[tuple[int, ...]]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [decoded(correction).token_ids for _ in range(2)]

    first = two_texts(0)
    assert two_texts(0) == first
    assert len({*first, *two_texts(1)}) == 4


FALSE_ALARM = 1e-6  # the chance that right code fails a chi-square test, were torch's seed drawn anew
V, TEXTS, MORE, HEAT = 7, 1000, 4000, 0.9
DRAFTED = SparsityConfig("fine", 0.1)


@cache
def small_engine() -> Engine:
    """A model of V tokens none of which is rare."""
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return Engine(tiny_model(vocab_size=V, initializer_range=0.2, **ends))


def exact_distribution(prompt: list[int]) -> torch.Tensor:
    """Return the full model's probability of each three first tokens, [V ** 3] float64."""
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    with torch.inference_mode():
        logits = small_engine().model(torch.cat([torch.tensor([prompt]).expand(V * V, -1), pairs], 1)).logits
    first, second, third = (logits[:, -3:].double() / HEAT).softmax(-1).view(V, V, 3, V).unbind(2)
    return (first[0, 0][:, None, None] * second[:, 0][:, :, None] * third).flatten()


def chance_of_the_first_tokens(correction: CorrectionConfig, texts: int = TEXTS) -> float:
    """Return Pearson's probability of the first three tokens of many texts; rare ones are counted together."""
    options = {"max_new_tokens": 4, "sampling": HEAT, "sparsity": DRAFTED, "correction": correction}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        done = [got for _, got in small_engine().generate_many([[1, 2, 3, 4]] * texts, batch_size=250, **options)]
    assert sum(got.stats.corrections for got in done) > texts / 20 < sum(got.stats.accepted for got in done)
    drawn = torch.tensor([got.token_ids[:3] for got in done]) @ torch.tensor([V * V, V, 1])
    counts, expected = drawn.bincount(minlength=V**3).double(), texts * exact_distribution([1, 2, 3, 4])
    rare = expected < 5
    counts, expected = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (counts, expected))
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize(("width", "texts"), [(4, 600), slow(1, MORE), slow(4, MORE)])
def test_drafts_leave_the_distribution_of_the_first_tokens_as_it_is(width, texts):
    assert chance_of_the_first_tokens(sampling(3, width), texts) > FALSE_ALARM


@pytest.mark.slow
def test_a_lossy_rule_changes_the_distribution_noticeably():
    assert chance_of_the_first_tokens(CorrectionConfig(3, "threshold")) < FALSE_ALARM


@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)
def test_tokens_outside_top_k_never_appear(correction):
    def outside(top_k: int) -> int:
        """Count the tokens of a few hot texts that are none of the three likeliest."""
        count = 0
        for seed in range(5):
            tokens = decoded(correction, chosen=SamplingConfig(3.0, top_k=top_k, seed=seed)).token_ids
            likeliest = full_model_scores(tokens).topk(3).indices.tolist()
            count += sum(token not in three for token, three in zip(tokens, likeliest, strict=True))
        return count

    assert outside(3) == 0
    assert outside(0) > 0, "nothing had to be left out"


def test_argmax_with_a_temperature_is_refused():
    with pytest.raises(ConfigError, match=r"accept 'argmax' is for greedy text, and temperature is 0\.7"):
        decoded(GREEDY["chain"], chosen=0.7)
    with pytest.raises(ConfigError, match="use accept 'lossless'"):
        list(engine().generate_many(PROMPTS, correction=GREEDY["tree"], sampling={"temperature": 0.7}))
    assert decoded(GREEDY["chain"], chosen=0.0).stats.lossless


@pytest.mark.parametrize("threshold", [0.1, 0.9])
def test_the_rule_of_sampling_is_called_lossless_and_a_threshold_with_a_temperature_is_not(threshold):
    assert decoded(CORRECTIONS["chain"]).stats.lossless and decoded(CORRECTIONS["tree"]).stats.lossless
    lossy = CorrectionConfig(5, "threshold", threshold)
    assert not decoded(lossy).stats.lossless
    assert decoded(lossy, chosen=0.0).stats.lossless == (threshold > 0.5)
    assert not decoded(None).stats.lossless, "the draft model alone"


@pytest.mark.parametrize("shape", CORRECTIONS)
@pytest.mark.parametrize("chosen", [SamplingConfig(), *SAMPLINGS.values()], ids=["greedy", *SAMPLINGS])
def test_logprobs_are_those_of_a_fresh_pass_of_the_full_model(shape, chosen):
    got = decoded((CORRECTIONS if chosen.temperature else GREEDY)[shape], chosen=chosen)
    assert got.stats.accepted and got.stats.corrections
    want = full_model_scores(got.token_ids).log_softmax(-1)[range(NEW), list(got.token_ids)]
    torch.testing.assert_close(torch.tensor(got.logprobs, dtype=torch.float64), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", CORRECTIONS)
@pytest.mark.parametrize("chosen", [0.0, SamplingConfig(1.0, seed=3)], ids=["greedy", "sampled"])
def test_origins_say_which_tokens_were_drafted_and_what_followed_them(shape, chosen):
    correction = (CORRECTIONS if chosen else GREEDY)[shape]
    shared = {"sparsity": SparsityConfig("fine", 0.3), "correction": correction}
    updates = list(engine().stream(PROMPT, max_new_tokens=NEW, sampling=chosen, **shared))
    rounds = [update.round for update in updates]
    assert rounds[0].origins == ("full",)
    for done in rounds[1:]:
        last = "full" if not done.draft else "bonus" if done.accepted == done.steps else "correction"
        assert done.origins == ("draft",) * done.accepted + (last,)
        assert done.tokens[:-1] == done.draft[: done.accepted]
        assert done.accepted == len(done.draft) or done.tokens[-1] != done.draft[done.accepted]
    assert updates[-1].completion.origins == tuple(origin for done in rounds for origin in done.origins)
    assert {"full", "draft", "correction", "bonus"} >= set(updates[-1].completion.origins) >= {"draft", "correction"}
