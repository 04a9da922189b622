"""The root-mean-square norms of a model, each a single pass over its tokens in place of eight operations."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sirius.kernels import ops, reference
from sirius.kernels.launch import is_plain
from sirius.kernels.reference import NormForm
from sirius.model.adopt import Part, adopt, own_forward
from sirius.model.prepared import Prepared

FORMS = NormForm(0, True), NormForm(0, False), NormForm(1, False)
EPSILON = ("variance_epsilon", "eps")  # what families call it


class FastNorm(Part):
    """A norm by our kernel, and by its own code where the kernel cannot take it.

    form  how the norm's family rounds and shifts its weight
    """

    form: NormForm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the norm of x [..., H]; further arguments are for the norm's own code."""
        if "prepared" not in vars(self):  # called by someone who kept it beyond `restore`
            return type(self).forward(self, x, *args, **kwargs)
        if not args and not kwargs:
            found = ops.norm(x, cast("Tensor", self.weight), _epsilon(self), self.form)
            if found is not None:
                return found
        return super().forward(x, *args, **kwargs)


def adopt_norms(model: PreTrainedModel, prepared: Prepared) -> None:
    """Make every norm of a model on the CPU a `FastNorm`, if our kernel computes the same."""
    if model.device.type != "cpu":
        return
    for module in [each for each in model.modules() if _is_norm(each)]:
        if (form := form_of(module)) is not None:
            adopt(module, FastNorm, prepared, form=form)


@torch.no_grad()
def form_of(norm: nn.Module) -> NormForm | None:
    """Return which form a norm has, by what it makes of random tokens in bfloat16; None if none of ours.

    The tokens are small and large ones, so that epsilon tells, and a token that differs is not lost among others.
    """
    generator = torch.Generator().manual_seed(0)
    tried = deepcopy(norm).to(torch.bfloat16)
    weight = cast("Tensor", tried.weight)
    weight.copy_(torch.randn(weight.shape, generator=generator))
    sizes = 10.0 ** torch.linspace(-4, 2, 16).view(2, 8, 1)
    x = (torch.randn(2, 8, len(weight), generator=generator) * sizes).bfloat16()
    try:
        found = tried.forward(x)  # past its hooks, which are not to see this
    except (TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    want = found.float()
    differences = {
        form: float(((reference.norm(x, weight, _epsilon(norm), form) - want).norm(dim=-1) / want.norm(dim=-1)).max())
        for form in FORMS
    }
    best = min(FORMS, key=differences.__getitem__)
    return best if differences[best] < torch.finfo(x.dtype).eps / 4 else None


def _is_norm(module: nn.Module) -> bool:
    weights = dict(module.named_parameters())
    return (
        not isinstance(module, Part)
        and type(module).__name__.endswith("RMSNorm")
        and list(weights) == ["weight"]
        and weights["weight"].ndim == 1
        and is_plain(weights["weight"])
        and isinstance(_epsilon(module), float)
        and not own_forward(module)
    )


def _epsilon(norm: nn.Module) -> Any:
    return next((getattr(norm, name) for name in EPSILON if hasattr(norm, name)), None)
