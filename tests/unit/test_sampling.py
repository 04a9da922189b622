"""The noise that makes an argmax a sample. Random tests say with which chance right code would fail them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius.decoding.sampling import Noise

V = 5
LIKE = torch.zeros(V)
SCORES = torch.tensor([1.5, 0.0, -1.0, 0.7, -3.0])
FALSE_ALARM = 1e-6  # the chance that right code fails a test, were the seed drawn anew


def chance(counts: Tensor, expected: Tensor, freedom: int) -> float:
    """Return the probability of counts at least this far from the expected ones (Pearson's chi-square)."""
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), statistic.double() / 2))


def sample(scores: Tensor, count: int, seed: int = 0) -> Tensor:
    noise = Noise(seed)
    return torch.stack([scores + noise.at(token, scores) for token in range(count)]).argmax(-1)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.data())
def test_a_seed_gives_the_same_noise_in_whatever_order_it_is_asked_for_and_forgotten(asked, data):
    plain, noise, forgotten, drawn = Noise(3), Noise(3), 0, 0
    want = [plain.at(token, LIKE) for token in range(31)]
    for token in asked:
        if token >= forgotten:
            assert torch.equal(noise.at(token, LIKE), want[token])
            drawn = max(drawn, token + 1)
        forgotten = data.draw(st.integers(forgotten, drawn))
        noise.forget(forgotten)


def test_other_seeds_and_other_tokens_have_other_noise():
    noises = [Noise(seed).at(token, LIKE) for seed in (0, 1, 2**31) for token in range(4)]
    assert len({tuple(noise.tolist()) for noise in noises}) == 12


def test_forgotten_noise_is_let_go():
    noise = Noise(0)
    noise.at(99, LIKE)
    noise.forget(98)
    assert len(noise.drawn) == 2


def test_noise_has_the_dtype_of_the_scores():
    exact, rounded = Noise(1).at(0, LIKE.double()), Noise(1).at(0, LIKE)
    assert exact.dtype == torch.float64
    assert torch.equal(exact.float(), rounded)


def test_the_argmax_of_noisy_scores_has_the_softmax_distribution():
    counts = sample(SCORES, 20_000).bincount(minlength=V)
    assert chance(counts, SCORES.softmax(0) * 20_000, V - 1) > FALSE_ALARM


def test_other_scores_would_be_noticed():
    counts = sample(SCORES, 20_000).bincount(minlength=V)
    assert chance(counts, (1.1 * SCORES).softmax(0) * 20_000, V - 1) < FALSE_ALARM


def test_a_token_says_nothing_of_the_next():
    drawn = sample(SCORES, 40_000)
    pairs = (drawn[0::2] * V + drawn[1::2]).bincount(minlength=V * V).view(V, V)
    expected = pairs.sum(1, keepdim=True) * pairs.sum(0) / pairs.sum()
    assert chance(pairs, expected, (V - 1) ** 2) > FALSE_ALARM


def test_neighbouring_seeds_sample_apart():
    one, other = (sample(SCORES, 20_000, seed) for seed in (7, 8))
    together, apart = int((one == other).sum()), float(SCORES.softmax(0).square().sum()) * 20_000
    assert chance(torch.tensor([together, 20_000 - together]), torch.tensor([apart, 20_000 - apart]), 1) > FALSE_ALARM
