"""What is asked for: every bad value is refused by name, and nothing else is."""

import numpy as np
import pytest

from sirius.core import (
    LONGEST,
    MOST_GUESSES,
    CorrectionConfig,
    Request,
    SamplingConfig,
    SparsityConfig,
    check_together,
)
from sirius.errors import ConfigError
from sirius.forms import as_config

NAN, INF = float("nan"), float("inf")

BAD: list[tuple[type, dict[str, list]]] = [
    (
        SparsityConfig,
        {
            "method": [5, None],
            "keep": [0, -0.1, 1.01, NAN, "half", None, True],
            "threshold": [-0.1, NAN, "low", False],
            "per_branch": [1, "yes", None],
            "shared_set": [0, "no"],
            "refresh": [-0.1, 1.1, NAN, "some", True],
        },
    ),
    (
        CorrectionConfig,
        {
            "period": [0, -1, 2.0, "often", True, None],
            "accept": [3, None],
            "threshold": [-0.1, 0.1, 1.1, NAN, "0.1"],  # 0.1 beside the rule that has none
            "accept_temperature": [0, -1.0, INF, NAN, "warm"],
            "tree_width": [0, -2, 1.5, True],
            "prune": [-0.1, 1.1, NAN, None],
            "ablate": ["rewrite", "", ("rewrites",), ["rollback", "all"], None, 5, [["rewrite"]]],
        },
    ),
    (
        SamplingConfig,
        {
            "temperature": [-0.1, INF, NAN, "hot", True],
            "top_p": [0, -0.1, 1.1, NAN, None],
            "top_k": [-1, 2.0, True],
            "min_p": [-0.1, 1.1, NAN],
            "repetition_penalty": [0, -1.0, INF, NAN, "much"],
            "seed": [-1, 2**32, 1.0, "x", True],
        },
    ),
]
CASES = [(kind, name, value) for kind, bad in BAD for name, values in bad.items() for value in values]


@pytest.mark.parametrize(("kind", "name", "value"), CASES, ids=[f"{k.__name__}-{n}-{v}" for k, n, v in CASES])
def test_a_bad_value_is_refused_by_name(kind, name, value):
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        kind(**{name: value})


@pytest.mark.parametrize(
    "kind_and_fields",
    [
        (SparsityConfig, {"keep": 1, "threshold": 0, "refresh": 1}),
        (SparsityConfig, {"keep": 1e-9, "threshold": 1e9, "refresh": 0.0, "per_branch": True, "shared_set": True}),
        (
            CorrectionConfig,
            {"period": 1, "accept": "typical", "threshold": 0, "accept_temperature": 1e-3, "tree_width": 1, "prune": 1},
        ),
        (
            CorrectionConfig,
            {"period": "auto", "accept": "threshold", "threshold": 1, "prune": 0, "ablate": ("rewrite", "rollback")},
        ),
        (SamplingConfig, {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 1, "seed": 0}),
        (SamplingConfig, {"temperature": 5, "top_p": 1e-9, "repetition_penalty": 2, "seed": 2**32 - 1}),
    ],
)
def test_the_ends_of_each_range_are_allowed(kind_and_fields):
    kind, values = kind_and_fields
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"stop": ("",)}, {"stop": (3,)}])
def test_a_request_is_refused_by_name_too(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Request((1, 2), **bad)


def test_an_ablation_is_the_same_however_it_is_listed():
    assert CorrectionConfig(ablate=["rewrite"]) == CorrectionConfig(ablate=("rewrite",))  # type: ignore[arg-type]
    assert hash(CorrectionConfig(ablate=["rewrite"])) == hash(CorrectionConfig(ablate=("rewrite",)))  # type: ignore[arg-type]


LOSSLESS = [
    ({}, True, True),
    ({"accept": "lossless", "tree_width": 4}, True, True),
    ({"accept": "argmax"}, True, True),
    ({"accept": "sampling"}, True, True),
    ({"accept": "sampling", "tree_width": 4, "prune": 0.1, "period": "auto"}, True, True),
    ({"accept": "threshold", "threshold": 0.1}, False, False),
    ({"accept": "threshold", "threshold": 0.5}, False, False),
    ({"accept": "threshold", "threshold": 0.51}, True, False),
    ({"accept": "relative", "threshold": 0.9}, False, False),
    ({"accept": "typical", "threshold": 0.9}, False, False),
    ({"accept": "argmax", "ablate": ("rewrite",)}, False, False),
    ({"accept": "threshold", "threshold": 0.1, "period": 1}, True, True),
]


@pytest.mark.parametrize(("values", "greedy", "sampled"), LOSSLESS)
def test_lossless_is_what_lets_the_own_choice_alone_pass(values, greedy, sampled):
    config = CorrectionConfig(**values)
    assert (config.lossless(sampled=False), config.lossless(sampled=True)) == (greedy, sampled)


def test_the_longest_window_is_the_period_or_what_auto_may_choose():
    assert CorrectionConfig(period=40).longest == 40
    assert CorrectionConfig(period="auto").longest == LONGEST


def test_the_argmax_rule_is_for_greedy_text_alone():
    hot, argmax = SamplingConfig(temperature=0.7), CorrectionConfig(accept="argmax")
    with pytest.raises(ConfigError, match=r"'argmax'.*0\.7.*'lossless'"):
        check_together(hot, argmax)
    check_together(SamplingConfig(), argmax)
    check_together(hot, CorrectionConfig(accept="sampling"))
    check_together(hot, CorrectionConfig())
    check_together(hot, None)


@pytest.mark.parametrize(
    ("kind", "value", "want"),
    [
        (SparsityConfig, "fine", SparsityConfig("fine")),
        (SparsityConfig, {"method": "fine", "keep": 0.3}, SparsityConfig("fine", 0.3)),
        (CorrectionConfig, 7, CorrectionConfig(period=7)),
        (CorrectionConfig, "auto", CorrectionConfig(period="auto")),
        (CorrectionConfig, "paper", CorrectionConfig(16, "threshold", 0.1, accept_temperature=0.6)),
        (SamplingConfig, 0.5, SamplingConfig(temperature=0.5)),
        (SamplingConfig, {}, SamplingConfig()),
    ],
)
def test_a_configuration_may_be_its_fields_or_its_first_field(kind, value, want):
    assert as_config(kind, value) == want


def test_a_configuration_is_taken_as_it_is():
    config = SamplingConfig(temperature=0.3)
    assert as_config(SamplingConfig, config) is config


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"keeps": 0.5}, "keeps"),
        ({3: 4}, "3: 4"),
        ({"keep": 7}, "keep"),
        (None, "method"),
        (SamplingConfig(), "method"),
    ],
)
def test_what_is_no_configuration_is_refused(value, named):
    with pytest.raises(ConfigError, match=named):
        as_config(SparsityConfig, value)


def test_the_papers_setting_may_be_changed_in_a_field_and_is_lossy():
    assert CorrectionConfig.paper(threshold=0.05) == CorrectionConfig(16, "threshold", 0.05, accept_temperature=0.6)
    assert CorrectionConfig.paper(accept="lossless") == CorrectionConfig(16)
    assert not CorrectionConfig.paper().lossless(sampled=False)
    assert CorrectionConfig(accept="typical").least == CorrectionConfig.paper().threshold == 0.1


@pytest.mark.parametrize("rule", ["lossless", "argmax", "sampling"])
def test_a_threshold_beside_a_rule_that_has_none_is_refused_with_both(rule):
    with pytest.raises(ConfigError, match=rf"0\.3.*'{rule}'.*'threshold' \(lossy\)"):
        CorrectionConfig(accept=rule, threshold=0.3)


@pytest.mark.parametrize("word", ["lossless", "argmax", "papers", ""])
def test_a_correction_by_an_unknown_word_names_those_there_are(word):
    with pytest.raises(ConfigError, match=rf"'auto' or 'paper'; got '{word}'"):
        as_config(CorrectionConfig, word)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        *[(CorrectionConfig, v, "a period, 'auto', 'paper', CorrectionConfig(period=16)") for v in (False, True, [])],
        *[(SparsityConfig, v, "a method's name, SparsityConfig(method='coarse', keep=0.3)") for v in (None, 0.3, True)],
        *[(SamplingConfig, v, "a temperature, SamplingConfig(temperature=0.7)") for v in ("x", True, [0.5])],
    ],
)
def test_a_value_of_another_kind_is_refused_with_an_example_of_what_was_expected(kind, value, said):
    with pytest.raises(ConfigError) as caught:
        as_config(kind, value)
    assert said in str(caught.value) and str(caught.value).endswith(f"; got {value!r}")


def test_a_check_reads_so_many_guesses_and_no_more():
    assert CorrectionConfig(period=2, tree_width=MOST_GUESSES).tree_width == MOST_GUESSES
    assert CorrectionConfig(period=MOST_GUESSES + 1).longest == MOST_GUESSES + 1
    for fields, named in (
        ({"period": 2, "tree_width": MOST_GUESSES + 1}, "tree_width 1025 with a period of up to 2 makes 1025 guesses"),
        ({"tree_width": 10_000_000}, "tree_width 10000000 with a period of up to 32 makes 310000000 guesses"),
        ({"period": 100_000}, "tree_width 1 with a period of up to 100000 makes 99999 guesses"),
    ):
        with pytest.raises(ConfigError, match=f"{named}, and a check reads at most {MOST_GUESSES} in its one pass"):
            CorrectionConfig(**fields)


def test_numbers_of_numpy_stand_for_configurations():
    assert as_config(CorrectionConfig, np.int64(5)) == CorrectionConfig(period=5)
    assert as_config(SamplingConfig, np.float64(0.5)) == SamplingConfig(temperature=0.5)
