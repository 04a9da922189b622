"""Settings as flat names: they come back as they went, and what fits nothing is refused by its name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sirius.core import CorrectionConfig, SparsityConfig
from sirius.errors import ConfigError
from sirius.settings import Setting, make_setting

SPARSITIES = st.builds(
    SparsityConfig,
    method=st.sampled_from(["coarse", "fine"]),
    keep=st.floats(0.01, 1.0),
    per_branch=st.booleans(),
    refresh=st.just(0.0),
)
CORRECTIONS = st.builds(
    CorrectionConfig,
    period=st.one_of(st.just("auto"), st.integers(1, 64)),
    accept=st.sampled_from(["lossless", "argmax"]),
    accept_temperature=st.floats(0.1, 2.0),
    tree_width=st.integers(1, 8),
    prune=st.floats(0.0, 1.0),
    ablate=st.sampled_from([(), ("rewrite",), ("rollback", "interleave")]),
) | st.builds(
    lambda threshold, width: CorrectionConfig.paper(threshold=threshold, tree_width=width),
    st.floats(0, 1),
    st.integers(1, 8),
)


@given(SPARSITIES, st.none() | CORRECTIONS)
def test_a_setting_comes_back_from_a_file_as_it_was(sparsity, correction):
    setting = Setting(sparsity, correction)
    again = make_setting(json.loads(json.dumps(setting.flat())))
    assert again.flat() == setting.flat()
    assert again.lossless == setting.lossless
    assert again.label() == setting.label()


def test_a_file_says_the_threshold_that_counts():
    assert make_setting({"accept": "threshold", "period": 4}).flat()["threshold"] == 0.1
    assert make_setting({"accept": "argmax", "period": 4}).flat()["threshold"] is None


def test_labels_and_files_name_the_bits_that_were_asked_for():
    for bits, label in ((4, "4 bits"), ("auto", "bits auto")):
        setting = make_setting({"draft_bits": bits, "period": 4})
        assert setting.flat()["draft_bits"] == bits and setting.label() == f"{label}, lossless, K 4, w 1"
        assert make_setting(setting.flat()) == setting and not setting.full
    assert make_setting({}).flat()["draft_bits"] == "auto"


def test_the_full_model_is_one_setting():
    assert make_setting({"sparsity": "none"}) == make_setting({"sparsity": "none", "correct": False, "keep": 0.5})
    assert make_setting({"sparsity": "none"}).label() == "full"
    assert make_setting({"sparsity": "none"}).lossless


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sparse": "coarse"}, "sparse"),
        ({"sparsity": "none", "keep": 0.3}, "keep"),
        ({"sparsity": "none", "correct": True}, "correct"),
        ({"correct": False, "period": 8}, "period"),
        ({"correct": "no"}, "correct"),
        ({"preset": "best"}, "preset"),
        ({"keep": 2.0}, "keep"),
        ({"accept": "argmax", "threshold": 0.5}, "threshold"),
        ({"ablate": "rewind"}, "ablate"),
    ],
)
def test_a_setting_that_fits_nothing_is_refused_by_its_name(values, named):
    with pytest.raises(ConfigError, match=named):
        make_setting(values)
