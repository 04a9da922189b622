"""A model's weights and their layout in memory, to be compared later."""

import torch
from transformers import PreTrainedModel


def snapshot(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """Return every weight with its layout in memory."""
    return {name: (w.detach().clone(), w.stride()) for name, w in _weights(model).items()}


def assert_as_before(model: PreTrainedModel, before: dict[str, tuple[torch.Tensor, tuple[int, ...]]]) -> None:
    now = _weights(model)
    assert list(now) == list(before)
    for name, (weight, stride) in before.items():
        assert torch.equal(now[name], weight), name
        assert now[name].stride() == stride, name


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights themselves; those of a state dict may be copies."""
    return dict(model.state_dict(keep_vars=True))
