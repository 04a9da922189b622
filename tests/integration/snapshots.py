"""A model's weights and their layout in memory, to be compared later."""

import torch
from transformers import PreTrainedModel


def snapshot(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """Return every weight with its layout in memory."""
    return {name: (w.clone(), w.stride()) for name, w in model.state_dict().items()}


def assert_as_before(model: PreTrainedModel, before: dict[str, tuple[torch.Tensor, tuple[int, ...]]]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    for name, (weight, stride) in before.items():
        assert torch.equal(now[name], weight), name
        assert now[name].stride() == stride, name
