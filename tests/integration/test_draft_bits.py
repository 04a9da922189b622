"""Drafts by the model's own weights at 4 and 8 bits: lossless texts, figures, memory, and where they are not used."""

import copy

import pytest
import torch
from drafts import NEW, PROMPT, chain, rounded

from conftest import FAMILIES, greedy, tiny_model
from sirius import restore
from sirius.batch import Batch
from sirius.core import DRAFT, CorrectionConfig, SparsityConfig
from sirius.decoding.period import Period
from sirius.engine import Engine
from sirius.errors import ConfigError
from sirius.forms import as_draft
from sirius.kernels import cpu, ops
from sirius.kernels.quantized import dequantize
from sirius.model import quantized
from sirius.model.matrix import dense
from sirius.model.prepare import count_parameters, prepare
from sirius.model.prepared import prepared_of
from sirius.model.quantized import QuantizedRows, RescoredHead, Twin, extra_memory, twin_of
from sirius.settings import make_setting

pytestmark = pytest.mark.integration

PROMPTS = [PROMPT, [9, 9], [70, 3, 12, 88, 41, 6, 19, 101, 55, 20, 33]]
compiled = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_of_fewer_bits_gives_the_full_models_greedy_text(family, bits):
    model = tiny_model(family, eos_token_id=None)
    want = greedy(model, PROMPT, NEW)
    engine = Engine(model)
    for method, correction in (("none", chain(5)), ("none", chain(4, 3)), ("coarse", chain(5)), ("fine", chain(3, 2))):
        got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(bits, method), correction=correction)
        assert list(got.token_ids) == want, f"{method}, {correction}"
        assert got.stats.lossless and got.stats.drafted


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_batches_write_what_full_decoding_writes_alone(dtype):
    engine = Engine(tiny_model(dtype=dtype, eos_token_id=None))
    want = [engine.generate(each, max_new_tokens=NEW, sparsity="none").token_ids for each in PROMPTS]
    for method, correction in (("none", chain(5)), ("none", chain(6, 3)), ("coarse", chain(4)), ("fine", chain(4))):
        options = {"sparsity": rounded(4, method), "correction": correction, "max_new_tokens": NEW}
        done = dict(engine.generate_many(PROMPTS, batch_size=2, **options))
        assert [done[index].token_ids for index in range(len(PROMPTS))] == want
        assert all(each.stats.lossless for each in done.values())


def test_more_bits_agree_more_often():
    engine = Engine(tiny_model(eos_token_id=None))

    def accepted(bits: int) -> int:
        options = {"max_new_tokens": 100, "correction": chain(8)}
        return engine.generate(PROMPT, sparsity=rounded(bits), **options).stats.accepted

    assert accepted(8) > 80 and accepted(8) >= accepted(4) > 20


@pytest.mark.parametrize(("spare", "bits"), [(0, 8), (-1, 4)], ids=["small", "larger"])
def test_the_default_draft_has_the_bits_that_suit_the_models_size(monkeypatch, spare, bits):
    model = tiny_model(eos_token_id=None)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    monkeypatch.setattr(quantized, "SMALL_MODEL", weights + spare)
    engine, options = Engine(model), {"max_new_tokens": NEW, "correction": chain(4)}
    default = engine.generate(PROMPT, **options)
    for sparsity in (DRAFT, rounded(bits)):
        named = engine.generate(PROMPT, sparsity=sparsity, **options)
        assert named.stats.density == default.stats.density and named.stats.accepted == default.stats.accepted
    assert default.stats.draft_bits == bits and set(prepared_of(model).twins) == {bits}


def test_bits_that_are_asked_for_are_read_whatever_the_models_size():
    engine = Engine(tiny_model(eos_token_id=None))
    for bits in (4, 8):
        assert engine.generate(PROMPT, sparsity=rounded(bits), correction=chain(4)).stats.draft_bits == bits


def test_a_text_for_which_no_weights_were_rounded_says_so():
    engine = Engine(tiny_model(eos_token_id=None))
    for options in ({"sparsity": "none"}, {"correction": 1}, {"sparsity": "coarse"}):
        assert engine.generate(PROMPT, max_new_tokens=4, **options).stats.draft_bits == 0


@pytest.mark.parametrize("bits", [3, "four", True, 4.0, None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="draft_bits are 4, 8, 'auto', or 0"):
        SparsityConfig("none", draft_bits=bits)


def test_the_rounded_model_alone_is_called_lossy():
    got = Engine(tiny_model()).generate(PROMPT, max_new_tokens=4, sparsity=rounded(4), correction=None)
    assert not got.stats.lossless


@pytest.mark.parametrize("bits", [4, 8])
def test_figures_count_the_bytes_that_drafts_and_checks_read(bits):
    model = tiny_model(eos_token_id=None)
    engine = Engine(model)
    got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(bits), correction=chain(4)).stats
    twin = twin_of(model, bits)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    norms = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    candidates = 16 * model.lm_head.weight.shape[1] * 4
    read = sum(each.nbytes for each in twin.weights.values()) + norms + candidates
    whole = sum(each.weight.nbytes for each in linears) + norms
    assert got.density_streamed == pytest.approx(read / whole)
    after_first = got.tokens - 1
    assert got.draft_bytes_per_token == pytest.approx(got.drafted * read / after_first)
    assert got.bytes_per_token == pytest.approx((got.drafted * read + got.rounds * whole) / after_first)


def test_a_sparse_draft_of_fewer_bits_reads_its_down_layers_whole():
    model = tiny_model(eos_token_id=None)
    engine, half = Engine(model), SparsityConfig("coarse", 20 / 45, draft_bits=4)
    whole = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(4), correction=chain(4)).stats
    sparse = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=half, correction=chain(4)).stats
    own = count_parameters(model, twin_of(model, 4))
    counted = count_parameters(model).counted("streamed")
    assert whole.density_streamed - sparse.density_streamed == pytest.approx((own.gate + own.up) * 25 / 45 / counted)


def test_weights_are_rounded_once_and_anew_after_they_changed():
    model = tiny_model()
    prepare(model)
    first = twin_of(model, 4)
    assert twin_of(model, 4) is first
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    again = twin_of(model, 4)
    assert again is not first
    name = id(model.lm_head)
    torch.testing.assert_close(dequantize(again.weights[name]), 2 * dequantize(first.weights[name]))


def test_weights_that_change_by_their_data_are_rounded_anew():
    """As adapters are merged; neither address nor version tells of it."""
    model = tiny_model()
    prepare(model)
    first = twin_of(model, 4)
    model.lm_head.weight.data += 0.5
    assert twin_of(model, 4) is not first


def test_weights_of_another_kind_are_not_rounded():
    model = tiny_model(eos_token_id=None)
    prepare(model, matrix=lambda layer, transposed: dense(layer, transposed))
    engine = Engine(model)
    assert not engine.generate(PROMPT, max_new_tokens=NEW).stats.drafted
    with pytest.raises(ConfigError, match="set draft_bits to 0"):
        engine.generate(PROMPT, correction=chain(4))


def test_rounded_weights_of_other_bits_go_unless_an_open_batch_reads_them():
    """Memory is to hold one kind beside the full weights."""
    model = tiny_model(eos_token_id=None)
    engine = Engine(model)
    for bits in (4, 8, 4):
        engine.generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(bits), correction=chain(4))
        assert set(prepared_of(model).twins) == {bits}
    batch = engine.batch(rows=1, sparsity=rounded(4), correction=chain(4))
    batch.add(engine.text(PROMPT, max_new_tokens=NEW))
    batch.step()
    engine.generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(8), correction=chain(4))
    assert set(prepared_of(model).twins) == {4, 8} and twin_of(model, 4) is batch.session.draft
    done = [update.completion for _ in range(NEW) if batch.busy for update in batch.step() if update.completion]
    assert list(done[0].token_ids) == greedy(model, PROMPT, NEW)
    del batch
    twin_of(model, 8)
    assert set(prepared_of(model).twins) == {8}


def test_a_batch_that_ends_leaves_no_rounded_weights_behind_that_were_replaced_meanwhile():
    model = tiny_model(eos_token_id=None)
    engine = Engine(model)
    batch = engine.batch(rows=1, sparsity=rounded(4), correction=chain(4))
    batch.add(engine.text(PROMPT, max_new_tokens=NEW))
    batch.step()
    engine.generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(8), correction=chain(4))
    del batch
    assert set(prepared_of(model).twins) == {8}


def test_no_second_kind_of_rounded_weights_is_in_memory_while_one_is_made(monkeypatch):
    model, seen = tiny_model(eos_token_id=None), []
    Engine(model).generate(PROMPT, max_new_tokens=NEW, sparsity=rounded(4), correction=chain(4))
    assert set(prepared_of(model).twins) == {4}
    quantize = ops.quantize
    monkeypatch.setattr(ops, "quantize", lambda *args: seen.append(set(prepared_of(model).twins)) or quantize(*args))
    twin_of(model, 8)
    assert seen and not any(seen)


def test_memory_that_is_released_is_not_that_of_weights_in_use():
    model = tiny_model()
    session = Engine(model).batch(sparsity=rounded(4), correction=chain(4)).session
    twin_of(model, 8)
    session.release()
    assert list(prepared_of(model).twins.values()) == [session.draft]


DRAFTS = [  # what is asked for in Python, by the names of a command line or grid, and the draft that both mean
    ({}, {}, DRAFT),
    ({"sparsity": "none"}, {"sparsity": "none"}, SparsityConfig("none")),
    ({"sparsity": "coarse"}, {"sparsity": "coarse"}, SparsityConfig("coarse")),
    ({"sparsity": {"draft_bits": 8}}, {"draft_bits": 8}, SparsityConfig("none", draft_bits=8)),
    ({"sparsity": {"draft_bits": 0}}, {"draft_bits": 0}, SparsityConfig("none")),
    ({"sparsity": {"draft_bits": "auto"}}, {"draft_bits": "auto"}, DRAFT),
    (
        {"sparsity": {"method": "fine", "draft_bits": "auto"}},
        {"sparsity": "fine", "draft_bits": "auto"},
        SparsityConfig("fine", draft_bits="auto"),
    ),
    ({"correction": "paper"}, {"preset": "paper"}, SparsityConfig("coarse")),
]


@pytest.mark.parametrize(("asked", "named", "draft"), DRAFTS, ids=str)
def test_python_grids_and_command_line_mean_the_same_draft(asked, named, draft):
    assert make_setting(named).sparsity == draft
    assert as_draft(asked.get("sparsity"), asked.get("correction")) == draft


def test_rounded_weights_go_with_restore_and_are_in_no_copy():
    model = tiny_model()
    prepare(model)
    twin_of(model, 8)
    clone = copy.deepcopy(model)
    prepare(clone)
    assert not prepared_of(clone).twins
    restore(model)
    assert not prepared_of(model).twins


def test_nothing_of_the_rounded_weights_is_saved(tmp_path):
    plain, used = tiny_model(), tiny_model()
    Engine(used).generate(PROMPT, max_new_tokens=4, correction=chain(4))
    assert used.state_dict().keys() == plain.state_dict().keys()
    used.save_pretrained(tmp_path)
    back = type(used).from_pretrained(tmp_path)
    for name, weight in plain.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)


def test_four_bits_take_27_percent_of_16():
    """At sizes that are multiples of 64; a row of another length is filled up."""
    model = tiny_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    prepare(model)
    linears = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert twin_of(model, 4).nbytes <= 0.275 * linears
    for bits in (4, 8):
        whole = sum(each.nbytes for each in model.parameters())
        assert extra_memory(model, bits) == pytest.approx(twin_of(model, bits).nbytes / whole)


def test_progress_is_told_up_to_the_end():
    model, told = tiny_model(), []
    prepare(model)
    Twin(model, 4, told.append)
    assert told == sorted(told) and told[-1] == 1


def test_the_heads_best_candidates_have_the_scores_of_the_full_weights():
    model = tiny_model()
    prepare(model)
    head = twin_of(model, 4)(model.lm_head)
    assert isinstance(head, RescoredHead)
    x = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    full, rough, got = model.lm_head(x), head.rounded.linear(x), head.linear(x)
    best = rough.topk(16).indices
    torch.testing.assert_close(got.gather(-1, best), full.gather(-1, best))
    others = torch.ones_like(got, dtype=torch.bool).scatter(-1, best, False)
    assert torch.equal(got[others], rough[others]) and not torch.equal(rough, full)


def test_down_adds_up_the_kept_neurons_columns_alone():
    model = tiny_model()
    prepare(model)
    layer = model.model.layers[0].mlp.down_proj
    matrix, index = twin_of(model, 8)(layer, True), torch.tensor([3, 7, 20, 44])
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    want = z @ layer.weight[:, index].T
    assert (matrix.project(z, index) - want).norm() < 0.03 * want.norm()


def test_the_matrix_of_a_fused_layer_is_parted_by_rows():
    model = tiny_model("phi3")
    prepare(model)
    layer = model.model.layers[0].mlp.gate_up_proj
    matrix = twin_of(model, 4)(layer)
    assert isinstance(matrix, QuantizedRows)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    half = layer.out_features // 2
    parts = [matrix.part(0, half).linear(x), matrix.part(half, 2 * half).linear(x)]
    assert torch.equal(torch.cat(parts, 1), matrix.linear(x))


def test_without_kernels_an_automatic_period_drafts_nothing_and_rounds_no_weight(monkeypatch):
    """Each product would make the full weights anew, so no period could pay."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    model = tiny_model(eos_token_id=None)
    got = Engine(model).generate(PROMPT, max_new_tokens=NEW)
    assert list(got.token_ids) == greedy(model, PROMPT, NEW)
    assert not got.stats.drafted and not prepared_of(model).twins


def test_a_period_of_the_callers_own_is_honoured_where_an_automatic_one_drafts_nothing(monkeypatch, caplog):
    model = tiny_model()
    engine = Engine(model)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert engine.batch().draft_bits == 0
    batch = engine.batch(period=Period(4))
    assert batch.draft_bits == 8 and batch.plan.period.now == 4
    assert "no kernel multiplies weights of 8 bits" in caplog.text
    prepare(model, matrix=lambda layer, transposed: dense(layer, transposed))
    with pytest.raises(ConfigError, match="this model's are of another kind"):
        engine.batch(period=Period(4))


def test_plain_decoding_rounds_no_weight():
    model = tiny_model()
    Batch(model, DRAFT, CorrectionConfig(period=1))
    assert not prepared_of(model).twins
