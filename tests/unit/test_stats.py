"""The figures, against the paper's own tables (arXiv 2409.03856)."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from sirius.core import LONGEST, CorrectionConfig, Origin, Round
from sirius.stats import DENSE, Basis, Parameters, Touched, combine, density, effective_density, summarise

# Parameters of the published models in millions: total, embedding, MLP (three equal matrices).
LLAMA_3_8B = (8030, 525.5, 5637)
LLAMA_2_7B = (6738, 131, 4329)
LLAMA_2_13B = (13016, 164, 8493)
LLAMA_3_70B = (70550, 1050, 56370)


def parameters(model: tuple[float, float, float]) -> Parameters:
    total, embedding, mlp = (round(million * 1e6) for million in model)
    return Parameters(total, total, embedding, mlp // 3, mlp // 3, mlp // 3)


def coarse(keep: float) -> Touched:
    return Touched(keep, keep, keep)


def fine(keep: float) -> Touched:
    return Touched(1.0, keep, keep)


@pytest.mark.parametrize(
    ("model", "touched", "printed"),
    [
        (LLAMA_3_8B, coarse(0.5), 0.65),
        (LLAMA_3_8B, fine(0.5), 0.76),
        (LLAMA_3_8B, coarse(0.4), 0.58),
        (LLAMA_3_8B, fine(0.4), 0.72),
        (LLAMA_2_7B, coarse(0.5), 0.69),
        (LLAMA_2_7B, fine(0.5), 0.79),
        (LLAMA_2_7B, coarse(0.4), 0.62),
        (LLAMA_2_7B, fine(0.4), 0.75),
        (LLAMA_2_13B, coarse(0.5), 0.68),
        (LLAMA_2_13B, fine(0.5), 0.78),
        (LLAMA_2_13B, coarse(0.4), 0.61),
        (LLAMA_2_13B, fine(0.4), 0.74),
    ],
)
def test_published_densities_are_met(model, touched, printed):
    """The tables round generously: they agree within .012 (Llama-2-7B counts a nominal 7.0 B)."""
    assert density(parameters(model), touched) == pytest.approx(printed, abs=0.012)


@pytest.mark.parametrize(("keep", "billions"), [(0.3, 31), (0.4, 37), (0.5, 42), (0.6, 48), (0.8, 59)])
def test_published_parameters_of_the_70b_model_are_met(keep, billions):
    assert density(parameters(LLAMA_3_70B), coarse(keep)) * 70.55 == pytest.approx(billions, abs=0.7)


def test_streamed_density_leaves_the_input_embedding_out():
    assert density(parameters(LLAMA_3_8B), coarse(0.5), "streamed") == pytest.approx(0.624, abs=1e-3)
    assert density(parameters(LLAMA_3_8B), fine(0.5), "streamed") == pytest.approx(0.750, abs=1e-3)


# Table 2: period, printed density, AAL, printed effective density.
PUBLISHED = [
    *[(16, 0.65, 15.22, 0.706), (16, 0.65, 15.29, 0.703), (16, 0.69, 15.00, 0.757), (16, 0.69, 15.87, 0.715)],
    *[(16, 0.68, 15.34, 0.730), (16, 0.68, 15.34, 0.730)],  # GSM8K, CSparse
    *[(16, 0.76, 15.37, 0.807), (16, 0.76, 15.03, 0.825), (16, 0.79, 15.69, 0.819), (16, 0.79, 15.91, 0.807)],
    *[(16, 0.78, 15.08, 0.842)],  # GSM8K, FSparse
    *[(16, 0.58, 14.76, 0.657), (16, 0.58, 15.43, 0.628), (16, 0.62, 15.07, 0.683), (16, 0.62, 15.80, 0.652)],
    *[(12, 0.61, 11.43, 0.674), (16, 0.61, 15.72, 0.645)],  # CSQA, CSparse
    *[(16, 0.72, 15.66, 0.753), (16, 0.72, 15.00, 0.786), (16, 0.75, 15.09, 0.811), (16, 0.75, 15.89, 0.771)],
    *[(16, 0.74, 14.30, 0.846), (16, 0.74, 15.72, 0.770)],  # CSQA, FSparse
    *[(16, 0.65, 14.67, 0.733), (16, 0.65, 15.10, 0.691), (12, 0.69, 10.88, 0.789), (16, 0.69, 14.84, 0.765)],
    *[(12, 0.68, 11.12, 0.762), (16, 0.68, 15.10, 0.741)],  # HumanEval, CSparse
    *[(16, 0.76, 15.42, 0.804), (16, 0.76, 15.54, 0.797), (16, 0.79, 15.27, 0.841)],  # HumanEval, FSparse
]


def test_31_of_the_32_published_effective_densities_are_met():
    """The odd one, HumanEval with CSparse on Llama-3-8B, is .712 by the formula where .691 is printed."""
    missed = [row for row in PUBLISHED if abs(effective_density(*row[:3]) - row[3]) > 0.00105]
    assert len(PUBLISHED) == 32
    assert missed == [(16, 0.65, 15.10, 0.691)]


SMALL = Parameters(total=1000, weights=2000, embedding=200, gate=400, up=400, down=400)


def window(drafted: int, accepted: int, cut: bool = False, period: int = 4) -> Round:
    """A window of `drafted` guesses, of which `accepted` stand; a stop cut its last token off."""
    origins: list[Origin] = ["draft" for _ in range(accepted)]
    if not cut:
        origins.append("bonus" if accepted == drafted else "correction")
    tokens, draft = tuple(range(len(origins))), tuple(range(drafted))
    return Round(tokens, tuple(origins), (-1.0,) * len(tokens), draft, accepted, steps=drafted, period=period, cut=cut)


def figures(
    *windows: Round,
    period: int | Literal["auto"] = 4,
    corrected: bool = True,
    touched: Touched = DENSE,
    seconds: float = 2.0,
):
    correction = CorrectionConfig(period, accept="argmax") if corrected else None
    return summarise((Round((7,)), *windows), Basis(SMALL, touched, correction, lossless=True), seconds)


def test_figures_of_a_generation_by_hand():
    got = figures(window(3, 3), window(3, 1), window(2, 0), window(3, 2, cut=True), touched=coarse(0.5))
    assert (got.rounds, got.rounds_complete, got.drafted, got.accepted, got.corrections) == (4, 2, 11, 6, 2)
    assert got.tokens == 1 + 4 + 2 + 1 + 2
    assert (got.rolled_back, got.corrections_per_token) == (2 + 2, 2 / 10)
    assert got.aal == (4 + 2 + 1 + 2) / 4
    assert got.aal_complete == (4 + 2) / 2
    assert got.acceptance_histogram == (1, 1, 1, 1)
    assert got.density == pytest.approx(1 - 300 / 1000)
    assert got.density_streamed == pytest.approx(1 - 300 / 900)
    assert got.effective_density == pytest.approx((11 * 0.7 + 4) / 9)
    assert got.parameters_per_token == pytest.approx(got.effective_density * 1000)
    assert got.bytes_per_token == pytest.approx(got.effective_density_streamed * 1800)
    assert got.tokens_per_second == 5.0


def test_whole_windows_cost_what_the_published_formula_says():
    got = figures(window(3, 3), window(3, 0), window(3, 2), touched=fine(0.25))
    assert got.aal is not None
    assert got.effective_density == pytest.approx(effective_density(4, got.density, got.aal))


def test_without_correction_every_token_costs_the_density():
    steps = [Round((1,)), Round((2,))]
    got = figures(*steps, period=1, corrected=False, touched=coarse(0.5))
    assert got.effective_density == pytest.approx(got.density) == pytest.approx(0.7)
    assert got.aal is None and got.aal_complete is None


def test_figures_have_the_names_that_other_programs_give_them_too():
    got = figures(window(3, 3), window(3, 1))
    assert (got.acceptance_rate, got.mean_acceptance_length) == (4 / 6, got.aal)
    plain = figures(Round((1,)), period=1)
    assert plain.acceptance_rate is None and plain.mean_acceptance_length is None


def test_a_text_of_one_token_has_no_windows():
    got = figures()
    assert got.aal is None and got.tokens == 1 and got.acceptance_histogram == (0, 0, 0, 0)
    assert got.effective_density == 1.0


def test_generations_taken_together_weigh_by_windows_and_tokens():
    one, other = figures(window(3, 3), touched=coarse(0.5)), figures(window(3, 0), window(3, 1), touched=coarse(0.5))
    both = combine([one, other, figures()])
    assert both.aal == (4 + 1 + 2) / 3
    assert both.effective_density == pytest.approx((9 * 0.7 + 3) / 7)
    assert both.acceptance_histogram == (1, 1, 0, 1)
    assert both.seconds == 6.0 and both.tokens == 10 and both.tokens_per_second == 10 / 6


def test_different_settings_are_not_taken_together():
    with pytest.raises(ValueError, match="one setting"):
        combine([figures(period=4), figures(period=5)])
    with pytest.raises(ValueError, match="at least one"):
        combine([])


def test_windows_of_changing_length_are_complete_by_their_own_period():
    got = figures(window(3, 3), window(7, 7, period=8), window(3, 1, period=8), period="auto")
    assert (got.rounds_complete, got.aal_complete, got.aal, got.period) == (2, (4 + 8) / 2, (4 + 8 + 2) / 3, "auto")
    assert len(got.acceptance_histogram) == LONGEST


def test_plain_steps_between_windows_of_an_automatic_period_count_in_cost_and_in_no_advance():
    plain = Round((1,))
    got = figures(plain, window(3, 3), plain, window(3, 1), period="auto")
    assert got.aal == (4 + 2) / 2 and got.aal_complete == (4 + 2) / 2
    assert (got.rounds, got.rounds_complete, sum(got.acceptance_histogram)) == (4, 2, 2)
    assert got.effective_density == pytest.approx((6 * got.density + 4) / 8)
    assert figures(plain, plain, period="auto").aal is None


def test_corrections_taken_together_are_per_token_of_all():
    both = combine([figures(window(3, 0)), figures(window(3, 3), window(3, 1))])
    assert (both.corrections, both.rolled_back, both.tokens) == (2, 3 + 2, 2 + 7)
    assert both.corrections_per_token == 2 / 9


def test_a_round_ends_where_a_stop_ends_it():
    scores = torch.arange(8.0).view(4, 2)
    whole = replace(window(3, 3), scores=scores, logits=-scores)
    assert whole.until(4) is whole
    ended = whole.until(2)
    assert ended.scores is not None and ended.logits is not None
    assert torch.equal(ended.scores, scores[:2]) and torch.equal(ended.logits, -scores[:2])
    assert replace(ended, scores=None, logits=None) == window(3, 2, cut=True)


def test_a_stop_after_the_kept_guesses_leaves_them_all():
    assert window(3, 1).until(1) == Round((0,), ("draft",), (-1.0,), (0, 1, 2), 1, steps=3, period=4, cut=True)
