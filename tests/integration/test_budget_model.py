"""A model under a memory budget, as transformers and PyTorch see it: it computes what it did, or says why not."""

import copy
import io
import pickle
import threading
from functools import wraps

import pytest
import torch
from budgets import saved, streamed, unmeasured
from safetensors.torch import save_model

import sirius
from conftest import greedy, slow
from sirius import likelihood
from sirius.core import SparsityConfig
from sirius.engine import Engine
from sirius.errors import ModelError, UnsupportedModelError
from sirius.hf.export import export, generate_with
from sirius.model.prepare import count_parameters, prepare, restore
from sirius.settings import make_setting

pytestmark = pytest.mark.integration

PROMPT = [5, 17, 93]
NONE = SparsityConfig("none")


@pytest.fixture(scope="module", params=["llama", "phi3"])
def folder(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch):
    unmeasured(monkeypatch)


@pytest.fixture
def engine(folder) -> Engine:
    found = streamed(folder, draft=NONE)
    assert sum(each.is_meta for each in found.model.parameters()) >= 16
    return found


@pytest.fixture
def whole(folder) -> Engine:
    return Engine.load(folder)


def test_a_plain_call_gives_the_scores_of_the_model_in_memory_and_no_gradients(engine, whole):
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.no_grad():
        want, hidden = whole.model(ids).logits, whole.model.model(ids).last_hidden_state
    got = engine.model(ids, labels=ids)
    assert torch.equal(got.logits, want) and not got.loss.requires_grad
    assert torch.equal(engine.model.model(ids).last_hidden_state, hidden)


def test_transformers_own_generate_and_ours_write_the_same_text(engine, whole):
    want = greedy(whole.model, PROMPT, 12)
    assert greedy(engine.model, PROMPT, 12) == want
    assert greedy(engine.model, PROMPT, 12, custom_generate=sirius.decode, sparsity="none") == want
    assert greedy(engine.model, PROMPT, 12, custom_generate=sirius.decode) == want
    ids = torch.tensor([PROMPT])
    exported = generate_with({"sparsity": "none"}, engine.model, ids, max_new_tokens=12, do_sample=False)
    assert exported[0, len(PROMPT) :].tolist() == want


def test_threads_may_call_a_model_that_decodes(engine, whole):
    want, ids = whole.generate(PROMPT, max_new_tokens=40), torch.tensor([PROMPT])
    with torch.no_grad():
        scores = whole.model(ids).logits
    wrong, done = [], threading.Event()

    def call():
        while not done.is_set():
            if not torch.equal(engine.model(ids).logits, scores):
                wrong.append("other scores")

    caller = threading.Thread(target=call)
    caller.start()
    try:
        got = engine.generate(PROMPT, max_new_tokens=40, sparsity="none")
    finally:
        done.set()
        caller.join()
    assert got.token_ids == want.token_ids and not wrong


def test_parameters_are_counted_as_those_in_memory(engine, whole):
    assert count_parameters(engine.model) == count_parameters(whole.model)
    assert engine.model.num_parameters() == whole.model.num_parameters()
    assert engine.model.get_memory_footprint() == whole.model.get_memory_footprint()


TEXTS = [
    (PROMPT, [7, 8, 9]),
    (PROMPT, [7, 8, 10]),
    ([5], [6]),
    (list(range(3, 103)), [9]),
    ([4, 5], list(range(3, 130))),
    (list(range(3, 130)), list(range(20, 90))),
]


@pytest.mark.parametrize(("read", "scored"), [(1024, 2**23), (16, 2**23), (50, 7 * 131), slow(50, 1)])
def test_scores_of_given_tokens_are_those_of_the_model_in_memory(engine, whole, monkeypatch, read, scored):
    monkeypatch.setattr(likelihood, "MOST_READ", read)
    monkeypatch.setattr(likelihood, "PLANNED_SCORES", scored)
    for batch_size in (1, 4):
        got, want = (each.score(TEXTS, batch_size=batch_size) for each in (engine, whole))
        for mine, theirs in zip(got, want, strict=True):
            assert mine.greedy == theirs.greedy
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_no_pass_reads_more_than_was_planned_for(engine, monkeypatch):
    read, scored, forward = [], [], type(engine.model).forward

    @wraps(forward)
    def seen(self, ids, **options):
        found = forward(self, ids, **options)
        read.append(ids.numel())
        scored.append(found.logits[..., 0].numel())
        return found

    monkeypatch.setattr(type(engine.model), "forward", seen)
    monkeypatch.setattr(likelihood, "MOST_READ", 50)
    monkeypatch.setattr(likelihood, "PLANNED_SCORES", 20 * 131)
    engine.score(TEXTS)
    assert max(read) <= 50 and max(scored) <= 20


SAVED = [
    pytest.param(lambda model, to: model.save_pretrained(to), "cannot be saved; copy its files", id="save_pretrained"),
    pytest.param(lambda model, to: model.model.save_pretrained(to), "cannot be saved; copy its", id="the decoder"),
    pytest.param(lambda model, to: model.state_dict(), "read the weights from its files", id="state_dict"),
    pytest.param(lambda model, to: torch.save(model.state_dict(), to / "x"), "read the weights", id="torch.save"),
    pytest.param(lambda model, to: save_model(model, str(to / "x")), "read the weights", id="safetensors"),
    pytest.param(lambda model, to: torch.save(model, to / "x"), "cannot be copied or pickled", id="whole"),
    pytest.param(lambda model, to: pickle.dump(model, io.BytesIO()), "cannot be copied or pickled", id="pickle"),
    pytest.param(lambda model, to: copy.deepcopy(model), "cannot be copied or pickled; load", id="deepcopy"),
    pytest.param(lambda model, to: copy.deepcopy(model.model.layers[0]), "cannot be copied", id="deepcopy of a block"),
    pytest.param(lambda model, to: model.load_state_dict({}), "cannot take other weights", id="load_state_dict"),
    pytest.param(lambda model, to: model.to(torch.float64), "cannot be converted or moved; load", id="to a dtype"),
    pytest.param(lambda model, to: model.to("meta"), "cannot be converted or moved; load it with", id="to a device"),
    pytest.param(lambda model, to: model.model.double(), "cannot be converted or moved", id="the decoder to a dtype"),
    pytest.param(lambda model, to: model.half(), "cannot be converted or moved", id="half"),
    pytest.param(lambda model, to: model.to_empty(device="cpu"), "cannot be converted or moved", id="to_empty"),
    pytest.param(lambda model, to: model.share_memory(), "cannot be converted or moved", id="share_memory"),
    pytest.param(lambda model, to: model.train(), "cannot be trained; train the whole model", id="train"),
    pytest.param(lambda model, to: restore(model), "load it without", id="restore"),
]


@pytest.mark.parametrize(("ask", "said"), SAVED)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_needs_all_weights_is_refused_in_one_line_and_changes_nothing(engine, whole, tmp_path, ask, said):
    before = [(each, each.dtype, each.device) for each in engine.model.parameters()]
    with pytest.raises(ModelError, match=said) as error:
        ask(engine.model, tmp_path)
    assert "\n" not in str(error.value)
    assert [each.name for each in tmp_path.iterdir() if each.suffix] == []
    after = [(each, each.dtype, each.device) for each in engine.model.parameters()]
    assert all(old[0] is new[0] and old[1:] == new[1:] for old, new in zip(before, after, strict=True))
    assert not engine.model.training
    assert engine.generate(PROMPT, max_new_tokens=9).token_ids == whole.generate(PROMPT, max_new_tokens=9).token_ids


def test_the_line_names_the_folder_and_how_many_weights_are_not_in_memory(engine, folder):
    with pytest.raises(ModelError) as error:
        engine.model.save_pretrained("nowhere")
    away = sum(each.is_meta for each in engine.model.parameters())
    assert str(error.value) == (
        f"this model was loaded with a memory budget, and {away} of its weights are not in memory, so that it cannot "
        f"be saved; copy its files ({folder}), or load it without a memory budget"
    )


@pytest.mark.parametrize(
    "same",
    [
        lambda model: model.to("cpu"),
        lambda model: model.to(torch.float32),
        lambda model: model.to(torch.device("cpu"), torch.float32),
        lambda model: model.cpu().float().eval(),
        prepare,
        lambda model: Engine(model),
    ],
)
def test_what_is_so_already_changes_nothing(engine, whole, same):
    same(engine.model)
    got = engine.generate(PROMPT, max_new_tokens=9, sparsity="none")
    assert got.token_ids == whole.generate(PROMPT, max_new_tokens=9).token_ids


def test_the_class_and_configuration_stay_the_models_own(engine, whole):
    for mine, theirs in ((engine.model, whole.model), (engine.model.model, whole.model.model)):
        assert isinstance(mine, type(theirs)) and type(mine).__name__ == type(theirs).__name__
    assert engine.model.config.to_dict() == whole.model.config.to_dict()


def test_a_folder_that_decodes_with_a_setting_is_written_without_weights(engine, tmp_path):
    path = export(tmp_path, make_setting({"sparsity": "none"}))
    assert path.is_file()
    with pytest.raises(UnsupportedModelError):
        restore(engine.model)
