"""What a round asks of its device. A stand-in is used: tensors that say when the host looks into them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from conftest import slow, tiny_model
from sirius import CorrectionConfig, Engine, SparsityConfig
from sirius.decoding import host, loop, tree
from sirius.kernels import cpu

ASKING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "_unique2", "unique_dim", "masked_select"}
answers: list[str] = []


class OnDevice(Tensor):
    """A tensor of a device that runs behind the host; results of what is done with it are such tensors too."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=held.device
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ASKING or (name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])):
            answers.append(name)
        args, kwargs = tree_map(inside, (args, kwargs or {}))
        return tree_map(lambda each: OnDevice(each) if isinstance(each, Tensor) else each, func(*args, **kwargs))


def inside(value: object) -> object:
    return value.held if isinstance(value, OnDevice) else value


@pytest.fixture
def engine(monkeypatch) -> Iterator[Engine]:
    """An engine whose weights, and so all that comes of them, are on the stand-in."""

    def fetch(*tensors: Tensor) -> list[Tensor]:
        answers.append("fetch")
        return [inside(tensor) for tensor in tensors]

    monkeypatch.setattr(cpu, "library", lambda: None)
    for module in (host, loop, tree):
        monkeypatch.setattr(module, "answers_at_once", lambda tensor: not isinstance(tensor, OnDevice))
    monkeypatch.setattr(loop, "fetch", fetch)
    monkeypatch.setattr(loop, "send", lambda values, device: OnDevice(torch.tensor(values, dtype=torch.int64)))
    engine = Engine(tiny_model(eos_token_id=7))
    for module in engine.model.modules():
        for name, each in [*module._parameters.items(), *module._buffers.items()]:
            if each is not None:
                made = OnDevice(each.data)
                setattr(module, name, torch.nn.Parameter(made, False) if name in module._parameters else made)
    answers.clear()
    yield engine


@pytest.mark.parametrize(
    ("method", "width"),
    [("coarse", 1), ("fine", 3), slow("coarse", 3), slow("fine", 1), slow("none", 1), slow("none", 3)],
)
def test_a_round_asks_its_device_once(engine, method, width):
    correction = CorrectionConfig(5, "argmax", tree_width=width)
    batch = engine.batch(rows=1, sparsity=SparsityConfig(method), correction=correction)
    batch.add(engine.text([5, 9, 2], max_new_tokens=18))
    asked = []
    while batch.busy:
        answers.clear()
        batch.step()
        asked.append(list(answers))
    checked = ["_local_scalar_dense"] * (method == "coarse")  # whether all layers' sets are sets, with the first round
    assert asked[1] == [*checked, "fetch"]
    assert all(each == ["fetch"] for each in asked[2:]), asked
