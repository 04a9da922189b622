"""A session for a study: the statistic of a prompt's neurons is brought up to date by what each check reads."""

from functools import partial
from typing import Any

from torch import Tensor

from sirius.core import Mode
from sirius.runtime.neurons import Observe, Route
from sirius.runtime.session import Session
from sirius.sparsity.base import PromptSparsity


class RefreshingSession(Session):
    """A session whose methods per prompt also learn from checked windows, see `SparsityConfig.refresh`.

    Its passes are not captured, as a method looks at the activations of each check.
    """

    captures = False

    def __init__(self, *args: Any, **options: Any) -> None:
        """Open an empty session; the arguments are those of `Session`."""
        super().__init__(*args, **options)
        self.seen: dict[int, Tensor] = {}  # z of the last check, [B, T, F] a layer
        self.rewound = False  # until tokens that were taken back are kept again

    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Let each row hold nodes of a window, see `Session.keep`, and show the kept tokens to its method."""
        super().keep(path, counts)
        if self.rewound:  # the statistic has these tokens already
            self.rewound, self.seen = False, {}
        if not self.seen:
            return
        for row, (method, nodes) in enumerate(zip(self.methods, path, strict=True)):
            kept = nodes[: int(counts[row])]
            if isinstance(method, PromptSparsity) and len(kept):
                for layer, z in self.seen.items():
                    method.refresh(layer, z[row, kept.to(z.device)])
        self.seen, self.drafts = {}, None

    def rewind(self, count: int) -> None:
        """Take tokens back, see `Session.rewind`."""
        self.rewound = True
        super().rewind(count)

    def _routes(self, mode: Mode, apart: bool = False) -> list[Route | None]:
        if mode is not Mode.DENSE:
            return super()._routes(mode, apart)

        def show(layer: int, z: Tensor) -> None:
            self.seen[layer] = z

        return [Observe(partial(show, layer)) for layer in range(len(self.mlps))]
