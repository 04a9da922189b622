"""Processors against those that transformers makes of the same settings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from conftest import VOCABULARY, tiny_model
from sirius.core import SamplingConfig
from sirius.processors import RepetitionPenalty, make_processor

MODEL = tiny_model()
IDS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
SCORES = 3 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def penal(monkeypatch):
    """A model whose checkpoint asks for sampling and a repetition penalty."""
    asked = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.4, repetition_penalty=1.7)
    monkeypatch.setattr(MODEL, "generation_config", asked)
    return MODEL


def theirs(sampling: SamplingConfig, penalty: float) -> torch.Tensor:
    """Return the scores after the processors that transformers makes for `generate` by itself."""
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p or None,
        repetition_penalty=penalty,
    )
    made = MODEL._get_logits_processor(config, input_ids_seq_length=9, device="cpu", model_kwargs={})
    return made(IDS, SCORES.clone())  # type: ignore[arg-type]


def ours(sampling: SamplingConfig) -> torch.Tensor:
    process = make_processor(sampling, MODEL)
    return process(IDS, SCORES.clone()) if process else SCORES


@settings(derandomize=True, deadline=None)
@given(
    st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    st.sampled_from([0.1, 0.8, 1.0]),
    st.sampled_from([0, 1, 5, 500]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.sampled_from([0.7, 1.0, 1.3]),
)
def test_scores_change_as_transformers_changes_them(temperature, top_p, top_k, min_p, penalty):
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, penalty)
    assert torch.equal(ours(sampling), theirs(sampling, penalty))


def test_greedy_needs_no_processor_whatever_is_said_of_sampling():
    assert make_processor(SamplingConfig(), MODEL) is None
    assert make_processor(SamplingConfig(top_p=0.5, top_k=3, min_p=0.1), MODEL) is None
    assert make_processor(SamplingConfig(temperature=1.0), MODEL) is None


def test_a_penalty_left_open_is_the_checkpoints(penal):
    assert torch.equal(ours(SamplingConfig()), theirs(SamplingConfig(), 1.7))
    assert torch.equal(ours(SamplingConfig(repetition_penalty=1.2)), theirs(SamplingConfig(), 1.2))


def test_of_the_checkpoints_settings_none_but_the_penalty_acts(penal):
    assert make_processor(SamplingConfig(repetition_penalty=1.0), penal) is None
    hot = SamplingConfig(temperature=2.0)
    assert torch.equal(ours(hot), theirs(hot, 1.7))


@pytest.mark.parametrize("ignored", [0, 3, 9])
@pytest.mark.parametrize("penalty", [0.7, 1.05, 2.0])
def test_the_repetition_penalty_is_transformers_own_bit_for_bit(penalty, ignored):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4, 12), generator=generator)
    tokens[:, 4:6] = 55  # a head may score fewer tokens than there are
    scores = torch.randn(4, 50, generator=generator)
    want = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=ignored)(tokens, scores)
    assert torch.equal(RepetitionPenalty(penalty, ignored)(tokens, scores.clone()), want)
