"""Weights that are rounded for drafts: no memory for them, changes of the full ones, and what is told of them."""

import logging

import pytest
import torch

from conftest import greedy, tiny_model
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError, OutOfMemoryError
from sirius.forms import as_config
from sirius.model import quantized

pytestmark = pytest.mark.integration

PROMPT, NEW = [5, 17, 93, 41], 12


@pytest.fixture
def full(monkeypatch):
    """Let memory run out whenever a weight is rounded; gives the calls."""
    calls = []

    def refuse(weight, bits):
        calls.append(bits)
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(quantized.ops, "quantize", refuse)
    return calls


def test_without_memory_for_its_weights_the_default_draft_is_done_without(full, caplog):
    model = tiny_model(eos_token_id=None)
    engine = Engine(model)
    for _ in range(2):
        got = engine.generate(PROMPT, max_new_tokens=NEW)
        assert list(got.token_ids) == greedy(model, PROMPT, NEW) and got.stats.draft_bits == 0
    assert full == [8], "it is tried once"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "no memory for the draft's weights at 8 bits, 37% beside the model's: drafts do not read any"
    ]


@pytest.mark.parametrize("options", [{"sparsity": SparsityConfig("none", draft_bits=4)}, {"correction": 4}], ids=str)
def test_without_memory_a_draft_that_was_asked_for_ends_the_text_with_one_line(full, options):
    engine = Engine(tiny_model(eos_token_id=None))
    with pytest.raises(OutOfMemoryError, match=r"no memory for the draft's weights at \d bits, .*; set draft_bits"):
        engine.generate(PROMPT, max_new_tokens=NEW, **options)


def test_any_weight_that_is_changed_in_place_is_rounded_anew():
    four = SparsityConfig("none", draft_bits=4)
    changed, fresh = (Engine(tiny_model(eos_token_id=None)) for _ in range(2))

    def draft(engine: Engine) -> list[int]:
        return list(engine.generate(PROMPT, max_new_tokens=NEW, sparsity=four, correction=None).token_ids)

    before = draft(changed)
    for engine in (changed, fresh):
        weight = engine.model.model.layers[0].self_attn.o_proj.weight
        row = quantized.SAMPLED - 1
        assert row % (len(weight) // quantized.SAMPLED), "this row is one of those that are looked at"
        with torch.no_grad():
            weight[row] = 5.0
    assert draft(changed) == draft(fresh) != before


def test_a_draft_alone_reads_all_that_is_read():
    engine = Engine(tiny_model(eos_token_id=None))
    four = SparsityConfig("none", draft_bits=4)
    stats = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=four, correction=None).stats
    assert stats.draft_bytes_per_token == pytest.approx(stats.bytes_per_token) and stats.bytes_per_token > 0
    corrected = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=four, correction=CorrectionConfig(4)).stats
    assert 0 < corrected.draft_bytes_per_token < corrected.bytes_per_token


def test_a_mapping_with_bits_alone_has_every_neuron_and_beside_others_the_method_that_they_are_of():
    assert as_config(SparsityConfig, {"draft_bits": 4}) == SparsityConfig("none", draft_bits=4)
    assert as_config(SparsityConfig, {"draft_bits": 4, "keep": 0.3}) == SparsityConfig("coarse", 0.3, draft_bits=4)
    with pytest.raises(ConfigError, match="SparsityConfig takes"):
        as_config(SparsityConfig, {"draft_bits": 4, "keeps": 0.3})


def test_bits_that_were_named_and_are_not_read_are_told(monkeypatch, caplog):
    monkeypatch.setattr(quantized.ops, "multiplies_quantized", lambda device, dtype: False)
    engine = Engine(tiny_model(eos_token_id=None))
    done = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=SparsityConfig("coarse", draft_bits=4))
    assert done.stats.draft_bits == 0
    assert "no kernel multiplies weights of 4 bits in torch.float32 on cpu: drafts do not read any" in caplog.text
    caplog.clear()
    engine.generate(PROMPT, max_new_tokens=NEW)
    assert not caplog.records, "nobody named any"
