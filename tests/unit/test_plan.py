"""The planner of offloading: it keeps to its budget, uses it well, and its figures follow from the sizes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, tiny_config
from sirius.core import SparsityConfig
from sirius.errors import ConfigError, UnsupportedModelError
from sirius.model.prepare import prepare
from sirius.model.quantized import twin_of
from sirius.offload import amounts
from sirius.offload.amounts import in_words, memory_of, parse_budget
from sirius.offload.plan import Link, Plan, Sizes, make_plan, smallest_budget, stream_everything
from sirius.offload.sizes import draft_of, sizes_of

DRAFTS = ["none", "rounded", "coarse"]
LINK, MEMORY = Link(100.0), 1000.0  # bytes a second
FAST = 1e6  # of a memory that is read in no time
SIZES = Sizes(  # ten equal blocks of 40 + 160 bytes
    fixed=1000,
    attention=(40,) * 10,
    mlp=(160,) * 10,
    rounded=(50,) * 10,
    rounded_head=30,
    kept=(80,) * 10,
    cache=200,
    working=300,
    head=100,
)
UNEVEN = replace(SIZES, attention=(30,) * 10)  # no number of attentions is as large as an MLP


def planned(sizes: Sizes, budget: int, draft: str, link: Link = LINK, memory: float = MEMORY, period: int = 16) -> Plan:
    return make_plan(sizes, budget, link, memory, draft, period, aal=0.8 * period)


def resident(sizes: Sizes, plan: Plan) -> dict[str, int]:
    parts = {name: (getattr(plan, name), getattr(sizes, name)) for name in ("attention", "mlp", "rounded", "kept")}
    return {name: sum(size for stays, size in zip(*part, strict=True) if stays) for name, part in parts.items()}


def passes(sizes: Sizes, plan: Plan, link: float, memory: float) -> float:
    """Return the seconds of a full pass in a row of them, event by event: as the ring of buffers works."""
    read, streamed = [], []
    for i in range(sizes.blocks):
        for stays, size in ((plan.attention[i], sizes.attention[i]), (plan.mlp[i], sizes.mlp[i])):
            read.append(size / memory)
            streamed.append(0 if stays else size / link)
    read.append((sizes.head + sizes.cache) / memory)
    streamed.append(0)
    units = [seconds for seconds in streamed if seconds]
    now = idle = 0.0  # what is computed until now, and when the link will be free
    sent, used, there, ends = 0, 0, [], []
    for _ in range(4):
        for seconds, away in zip(read, streamed, strict=True):
            if away:
                while sent < used + plan.buffers:  # the buffer before is free, so one more unit is on its way
                    idle = max(idle, now) + units[sent % len(units)]
                    there.append(idle)
                    sent += 1
                now = max(now, there[used])
                used += 1
            now += seconds
        ends.append(now)
    return ends[-1] - ends[-2]


@st.composite
def any_sizes(draw) -> Sizes:
    blocks = draw(st.integers(1, 12))
    size = st.integers(1, 10**6)
    some = st.one_of(size.map(lambda each: (each,) * blocks), st.tuples(*[size] * blocks))
    mlp = draw(some)
    keep = draw(st.floats(0.01, 1))
    return Sizes(
        fixed=draw(st.integers(0, 10**6)),
        attention=draw(some),
        mlp=mlp,
        rounded=draw(some),
        rounded_head=draw(size),
        kept=tuple(max(1, int(keep * each)) for each in mlp),
        cache=draw(st.integers(0, 10**6)),
        working=draw(st.integers(0, 10**6)),
        head=draw(st.integers(0, 10**6)),
    )


cases = given(
    sizes=any_sizes(),
    draft=st.sampled_from(DRAFTS),
    more=st.lists(st.floats(0, 1.1), min_size=2, max_size=2).map(sorted),
    rates=st.tuples(st.floats(1, 1e6), st.floats(1, 1e9)),
    period=st.integers(2, 32),
)
checked = settings(derandomize=True, deadline=None, max_examples=150)


def within(sizes: Sizes, draft: str, share: float) -> int:
    """Return a budget between the smallest and, at a share of 1, one with room for every part."""
    least = smallest_budget(sizes, draft)
    parts = sum(sum(part) for part in (sizes.attention, sizes.mlp, sizes.rounded, sizes.kept))
    return least + int(share * parts)


@checked
@cases
def test_a_plan_keeps_to_its_budget_and_counts_all_that_it_holds(sizes, draft, more, rates, period):
    plan = planned(sizes, within(sizes, draft, more[0]), draft, Link(rates[0]), rates[1], period)
    assert plan.used <= plan.budget
    assert plan.used == sizes.always(draft) + sum(resident(sizes, plan).values()) + plan.buffers * plan.unit


@checked
@cases
def test_every_byte_of_a_pass_is_in_memory_or_streamed(sizes, draft, more, rates, period):
    plan = planned(sizes, within(sizes, draft, more[0]), draft, Link(rates[0]), rates[1], period)
    held = resident(sizes, plan)
    assert plan.full_streamed + held["attention"] + held["mlp"] == sum(sizes.attention) + sum(sizes.mlp)
    found = [size for stays, size in zip(plan.mlp, sizes.kept, strict=True) if stays]  # of a coarse draft
    assert (
        plan.draft_streamed
        == {
            "none": 0,
            "rounded": sum(sizes.rounded) - held["rounded"],
            "coarse": sum(sizes.attention) - held["attention"] + sum(sizes.kept) - held["kept"] - sum(found),
        }[draft]
    )
    assert (plan.buffers == 0) == (plan.full_streamed == plan.draft_streamed == 0)
    assert plan.neurons == tuple(mlp or kept for mlp, kept in zip(plan.mlp, plan.kept, strict=True))
    assert not any(mlp and kept for mlp, kept in zip(plan.mlp, plan.kept, strict=True))


@checked
@cases
def test_a_larger_budget_never_makes_a_plan_slower(sizes, draft, more, rates, period):
    less, larger = (
        planned(sizes, within(sizes, draft, share), draft, Link(rates[0]), rates[1], period) for share in more
    )
    assert larger.seconds_per_token <= less.seconds_per_token


@checked
@cases
def test_the_smallest_budget_works_and_a_byte_less_does_not(sizes, draft, more, rates, period):
    least = smallest_budget(sizes, draft)
    assert planned(sizes, least, draft, Link(rates[0]), rates[1], period).used == least
    with pytest.raises(ConfigError, match=f"give at least {least} bytes"):
        planned(sizes, least - 1, draft, Link(rates[0]), rates[1], period)


@checked
@cases
def test_times_are_those_of_the_link_or_of_the_memory(sizes, draft, more, rates, period):
    link, memory = rates
    plan = planned(sizes, within(sizes, draft, more[0]), draft, Link(link), memory, period)
    read = sum(sizes.attention) + sum(sizes.mlp) + sizes.head + sizes.cache
    if plan.buffers == 2:
        assert plan.plain_seconds == pytest.approx(passes(sizes, plan, link, memory))
    else:
        assert plan.plain_seconds == pytest.approx(max(plan.full_streamed / link, read / memory))
    assert read / memory <= plan.full_seconds <= plan.plain_seconds + plan.switch_seconds
    assert plan.draft_seconds >= plan.draft_streamed / link
    assert (plan.switch_seconds > 0) == (plan.draft_streamed > 0 and plan.full_streamed > 0)
    assert plan.seconds_per_token == pytest.approx(
        ((plan.period - 1) * plan.draft_seconds + plan.full_seconds) / plan.aal
    )


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_smallest_budget_has_two_buffers_of_the_largest_part_of_a_block(draft):
    head = SIZES.rounded_head if draft == "rounded" else 0
    assert smallest_budget(SIZES, draft) == 1000 + 200 + 300 + head + 2 * 160
    plan = planned(SIZES, smallest_budget(SIZES, draft), draft)
    assert (plan.buffers, plan.unit) == (2, 160)


def test_a_shorter_context_is_advised_only_where_it_helps():
    least = smallest_budget(SIZES, "none")
    with pytest.raises(ConfigError, match=r"or shorten the context$"):
        planned(SIZES, least - 1, "none")
    with pytest.raises(ConfigError, match=rf"give at least {least} bytes$"):
        planned(SIZES, least - 201, "none")  # keys and values have 200


def test_a_third_buffer_is_made_where_it_saves_more_time_than_weights_in_its_place():
    least, near = smallest_budget(SIZES, "none"), Link(900.0)  # nearly as fast as the memory, so that both take turns
    assert planned(SIZES, least + 160, "none").buffers == 2
    assert planned(SIZES, least + 160, "none", near).buffers == 3


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_model_that_fits_stays_whole_and_streams_nothing(draft):
    whole = SIZES.always(draft) + 2000 + (500 if draft == "rounded" else 0)
    plan = planned(SIZES, whole, draft)
    assert all(plan.attention) and all(plan.mlp) and not any(plan.kept)
    assert plan.used == whole and plan.buffers == plan.full_streamed == plan.draft_streamed == 0
    assert planned(SIZES, whole - 1, draft).full_streamed > 0


def test_two_buffers_are_more_than_a_model_of_one_block():
    one = Sizes(10, (3,), (5,), (2,), 1, (2,), 0, 0)
    assert smallest_budget(one, "none") == 18
    assert planned(one, 18, "none").buffers == 0


def test_a_rounded_draft_stays_before_any_full_block_does():
    always = SIZES.always("rounded") + 2 * 160
    plan = planned(UNEVEN, always + 499, "rounded", memory=FAST)
    assert sum(plan.rounded) == 9 and not any(plan.mlp) and plan.draft_streamed == 50
    plan = planned(UNEVEN, always + 500 + 2 * 190, "rounded", memory=FAST)
    assert all(plan.rounded) and sum(plan.attention) == sum(plan.mlp) == 2 and plan.draft_streamed == 0


def test_a_coarse_draft_keeps_attention_then_neurons_then_mlps():
    always = SIZES.always("coarse")
    plan = planned(SIZES, always + 2 * 160 + 6 * 40, "coarse")
    assert sum(plan.attention) == 6 and not any(plan.kept) and not any(plan.mlp)
    plan = planned(SIZES, always + 2 * 160 + 400 + 4 * 80, "coarse")
    assert all(plan.attention) and sum(plan.kept) == 4 and not any(plan.mlp)
    plan = planned(SIZES, always + 2 * 160 + 400 + 800 + 2 * 80, "coarse")
    assert all(plan.attention) and sum(plan.kept) == 8 and sum(plan.mlp) == 2 and plan.draft_streamed == 0


def test_with_nearly_all_neurons_kept_mlps_stay_instead_of_copies():
    most = replace(SIZES, kept=(155,) * 10)
    plan = planned(most, most.always("coarse") + 400 + 2 * 160 + 800, "coarse")
    assert sum(plan.mlp) == 5 and not any(plan.kept)


@pytest.mark.parametrize("count", range(1, 7))
def test_blocks_that_stay_are_spread_evenly(count):
    plan = planned(UNEVEN, UNEVEN.always("none") + 2 * 160 + count * 190, "none", memory=FAST)
    places = [i for i, stays in enumerate(plan.mlp) if stays]
    gaps = {later - earlier for earlier, later in pairwise([*places, places[0] + 10])}
    assert len(places) == count and plan.attention == plan.mlp
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("draft", ["none", "rounded"])
def test_attention_fills_the_room_that_is_too_small_for_a_block(draft):
    rounded = 500 if draft == "rounded" else 0
    plan = planned(UNEVEN, UNEVEN.always(draft) + rounded + 2 * 160 + 3 * 190 + 2 * 30, draft, memory=FAST)
    assert (sum(plan.mlp), sum(plan.attention)) == (3, 5)
    assert all(attention for attention, mlp in zip(plan.attention, plan.mlp, strict=True) if mlp)


def test_a_link_that_drafts_leave_idle_fills_the_buffers_for_the_full_pass():
    plan = planned(SIZES, SIZES.always("rounded") + 2 * 160 + 500, "rounded")
    assert plan.draft_seconds == pytest.approx((500 + 30 + 200) / MEMORY)
    assert plan.full_streamed == 2000 and plan.fetched_ahead == 40  # one of two buffers holds the unit used last
    assert plan.full_seconds == plan.plain_seconds  # it comes while the last MLP, head and cache are read anyway
    light = replace(SIZES, head=0, cache=0, rounded=(500,) * 10)
    found = planned(light, light.always("rounded") + 2 * 160 + 5000, "rounded")
    assert found.fetched_ahead == 40 and found.full_seconds == pytest.approx(found.plain_seconds - (0.4 - 0.16))
    near = planned(SIZES, SIZES.always("rounded") + 3 * 160 + 500, "rounded", Link(900.0))
    assert near.buffers == 3 and near.fetched_ahead == 40 + 160
    short = planned(replace(SIZES, attention=(90,) * 10), plan.budget, "rounded", period=2)
    assert short.fetched_ahead == 73  # one draft of 0.73 s


def test_the_papers_setting_streams_attention_and_kept_neurons_in_each_draft():
    plan = stream_everything(SIZES, LINK, MEMORY, "coarse", 16, 15.2)
    assert plan.draft_streamed == 1200 and plan.full_streamed == 2000 and plan.fetched_ahead == 0
    assert plan.switch_seconds == pytest.approx(1.6 + 0.8)  # the first MLP, and its kept neurons
    # The first attention comes in 0.4 s, while the last MLP, the head and the cache are read in 0.46 s.
    assert plan.seconds_per_token == pytest.approx((15 * 12 + 20.06 + 2.4) / 15.2)
    assert plan.plain_seconds == pytest.approx(20.06)
    assert plan.used == plan.budget == smallest_budget(SIZES, "coarse")


def test_without_a_draft_period_and_advance_do_not_count():
    plan = make_plan(SIZES, 10_000, LINK, MEMORY, "none", period=16, aal=3.0)
    assert (plan.period, plan.aal, plan.draft_seconds) == (1, 1.0, 0.0)
    assert plan.seconds_per_token == plan.plain_seconds == plan.full_seconds


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"period": 1}, "period of at least 2; got 1"),
        ({"aal": 0.5}, "from 1 to 16 tokens on average; got 0.5"),
        ({"aal": 16.5}, "from 1 to 16"),
        ({"aal": float("nan")}, "from 1 to 16"),
        ({"memory_bytes_per_second": 0}, "the memory's bandwidth"),
        ({"memory_bytes_per_second": float("inf")}, "the memory's bandwidth"),
    ],
)
def test_settings_out_of_range_are_refused(changed, message):
    given = {"memory_bytes_per_second": MEMORY, "draft": "rounded", "period": 16, "aal": 12.0}
    with pytest.raises(ConfigError, match=message):
        make_plan(SIZES, 10_000, LINK, **{**given, **changed})


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_a_link_without_a_bandwidth_is_refused(rate):
    with pytest.raises(ConfigError, match="the link's bandwidth is a finite number"):
        Link(rate)


def test_sizes_that_do_not_fit_together_are_a_bug():
    with pytest.raises(ValueError, match="has four sizes"):
        replace(SIZES, kept=(1,))
    with pytest.raises(ValueError, match="at least 0"):
        replace(SIZES, cache=-1)
    with pytest.raises(ValueError, match="of no coarse draft"):
        planned(replace(SIZES, kept=(0,) * 10), 10_000, "coarse")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5KiB", 1536),
        ("0.1GB", 10**8),
        ("2TB", 2 * 10**12),
        ("1234567", 1234567),
        (" 1234567B ", 1234567),
        ("50%", 500),
        ("12.5%", 125),
        ("100%", 1000),
    ],
)
def test_a_budget_is_read_as_it_is_written(text, budget):
    assert parse_budget(text, total=1000) == budget


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GB", "0", "0%", "101%", "0.5", "8G", "8 GiB free", "1e9", "nan", "inf", "8XB", "1,5GB", "½GB"],
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ConfigError, match="such as 8GiB") as caught:
        parse_budget(text, total=1000)
    assert repr(text) in str(caught.value)


def test_amounts_are_shown_in_fitting_units():
    shown = [in_words(count) for count in (0, 999, 1000, 1_711_276_032, 136_902_082_560, 2e12)]
    assert shown == ["0 bytes", "999 bytes", "1 kB", "1.711 GB", "136.9 GB", "2 TB"]


@pytest.mark.parametrize(("limit", "expected"), [("1000000\n", 1_000_000), ("max\n", None), (None, None)])
def test_a_containers_limit_bounds_the_memory_of_the_machine(monkeypatch, tmp_path, limit, expected):
    monkeypatch.setattr(amounts, "LIMIT", tmp_path / "memory.max")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    found = memory_of(torch.device("cpu"))
    assert found == expected if expected else found > 2**28


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_sizes_of_a_configuration_are_those_of_the_model(family, tied):
    config = tiny_config(family, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    draft = SparsityConfig("coarse", 0.5, draft_bits=4)
    sizes = sizes_of(config, torch.bfloat16, draft, context=10, chunk=8)
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert sizes.fixed + sum(sizes.attention) + sum(sizes.mlp) == weights
    assert sizes.mlp == (3 * 45 * 36 * 2,) * 2 and sizes.kept == (3 * 22 * 36 * 2,) * 2
    assert sizes.head == model.get_output_embeddings().weight.nbytes
    assert sizes.cache == 2 * 2 * 2 * 6 * 10 * 2
    prepare(model)
    assert sum(sizes.rounded) + sizes.rounded_head == twin_of(model, 4).nbytes


def test_what_a_process_holds_and_a_longer_context_count():
    config, plain = tiny_config("llama"), SparsityConfig("none")
    one = sizes_of(config, torch.float32, plain, context=10, chunk=8)
    held = sizes_of(config, torch.float32, plain, context=10, chunk=8, held=12345)
    longer = sizes_of(config, torch.float32, plain, context=20, chunk=8)
    assert held == replace(one, process=12345)
    assert longer.cache == 2 * one.cache and longer.working > one.working
    assert not any(one.rounded) and not any(one.kept) and one.rounded_head == 0


def test_models_of_which_no_plan_can_be_made_are_refused():
    draft = SparsityConfig("coarse", 0.01)
    with pytest.raises(ConfigError, match="keeps none"):
        sizes_of(tiny_config("llama"), torch.float32, draft, 10, 8)
    with pytest.raises(ConfigError, match="can be made"):
        sizes_of(tiny_config("llama", hidden_act="nope"), torch.float32, SparsityConfig(), 10, 8)
    config = tiny_config("llama")
    config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        sizes_of(config, torch.float32, SparsityConfig(), 10, 8)


def test_a_configuration_of_sparsity_says_which_draft_it_is():
    assert draft_of(SparsityConfig("none")) == "none"
    assert draft_of(SparsityConfig("griffin")) == draft_of(SparsityConfig("coarse")) == "coarse"
    assert draft_of(SparsityConfig("none", draft_bits=8)) == draft_of(SparsityConfig("fine", draft_bits=4)) == "rounded"
    with pytest.raises(ConfigError, match="cannot be drafted with fine"):
        draft_of(SparsityConfig("fine"))
    with pytest.raises(ConfigError, match="no sparsity method 'corse'"):
        draft_of(SparsityConfig("corse"))
