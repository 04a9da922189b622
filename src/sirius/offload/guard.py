"""A model of which a part is not in memory, as its user sees it: it runs as before, and refuses what needs all weights.

Saving, copying, converting and training need them. PyTorch would leave those weights out, or fill in others.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sirius.errors import ModelError
from sirius.model.adopt import Part, adopt
from sirius.model.prepared import prepared_of


class Guarded(Part):
    """A model, or the decoder inside of it, some of whose weights come only while they are used."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, one thread at a time and without gradients, as the next block's weights replace the last."""
        with self.prepared.lock, torch.no_grad():
            return super().__call__(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ModelError: there is no room for all weights."""
        self._refuse("it has no whole state_dict", "read the weights from its files")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ModelError: other weights would not be used."""
        self._refuse("it cannot take other weights", "load the model that has them")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ModelError: the weights are in files already."""
        self._refuse("it cannot be saved", "copy its files")

    def train(self, mode: bool = True) -> "Guarded":
        """Set the mode to evaluation; raise ModelError of any other."""
        if mode:
            self._refuse("it cannot be trained", "train the whole model")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Guarded":
        """Move or convert nothing, which is what PyTorch is asked for by a dtype and device that are there already.

        Raises ModelError of others.
        """
        own = next(each for each in self.parameters() if not each.is_meta)
        tried = torch.empty(1, dtype=own.dtype, device=own.device)
        if fn(tried) is not tried or (tried.device.type == "cpu" and tried.is_shared()):
            self._refuse("it cannot be converted or moved", "load it with the other dtype or device")
        return super()._apply(lambda each: each if each.is_meta else fn(each), recurse)

    def _refuse(self, what: str, way: str) -> NoReturn:
        away = sum(each.is_meta for each in self.parameters())
        name = getattr(self, "name_or_path", "")
        raise ModelError(
            f"this model was loaded with a memory budget, and {away} of its weights are not in memory, so that {what}; "
            + way
            + (f" ({name})" if name else "")
            + ", or load it without a memory budget"
        )


def guard(model: PreTrainedModel) -> None:
    """Let a model whose weights are partly on meta, and its decoder, refuse what needs all of them."""
    for module in dict.fromkeys((model, model.base_model)):
        if not isinstance(module, Part):
            adopt(module, Guarded, prepared_of(model))
