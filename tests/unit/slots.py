"""A cache of odd sizes to attend to, for the kernels of every device."""

import torch

from sirius.kernels import reference


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, device="cpu").to(dtype).to(torch.get_default_device())


class Slots:
    """A cache of odd sizes in larger memory, with tokens to attend to it."""

    def __init__(
        self,
        dtype: torch.dtype,
        kv_heads: int = 2,
        groups: int = 3,
        tokens: int = 2,
        size: int = 20,
        held: tuple[int, int, int] = (130, 0, 257),
    ) -> None:
        self.held = torch.tensor(held)
        places, slots, rows = tokens + 2, held[2] + 4, len(held)  # many tokens' last places in that row have no slots
        self.query = random(dtype, rows, tokens, kv_heads * groups, size).transpose(1, 2)
        stores = (random(dtype, rows + 1, slots + 3, kv_heads, size, seed=seed) for seed in (1, 2))
        self.keys, self.values = (store[:rows, :slots] for store in stores)
        self.seen = random(torch.float32, rows, tokens, places) > 0
        self.seen[0, :, 1] = False  # a place that nobody sees
        self.seen[1, -1] = False  # a token that sees nothing, as its row holds none

    def attend(self, attend, scale: float, softcap: float | None) -> torch.Tensor:
        return attend(self.query, self.keys, self.values, self.held, self.seen, scale, softcap)

    def wanted(self, scale: float, softcap: float | None) -> torch.Tensor:
        query, keys, values = (each.double() for each in (self.query, self.keys, self.values))
        return reference.attend(query, keys, values, self.held, self.seen, scale, softcap)

    def poison(self) -> None:
        """Put NaN wherever no token looks."""
        for b, held in enumerate(self.held.tolist()):
            read = torch.zeros(self.keys.shape[1] + self.seen.shape[2], dtype=torch.bool)
            read[:held] = True
            read[held : held + self.seen.shape[2]] = self.seen[b].any(0)
            for store in (self.keys, self.values):
                store[b, ~read[: store.shape[1]]] = torch.nan


def check_attention(
    attend, dtype: torch.dtype, softcap: float | None, epsilon: float, *shape: int, **held: tuple[int, int, int]
) -> None:
    """Hold an attention to the reference, with NaN wherever no token looks."""
    slots = Slots(dtype, *shape, **held)
    want = slots.wanted(0.3, softcap)
    slots.poison()
    got = slots.attend(attend, 0.3, softcap)
    assert got.shape == want.shape and got.is_contiguous()
    assert bool(((got.double() - want).abs() <= 2 * epsilon * slots.values.double().nan_to_num().abs().max()).all())
    assert bool((got[1, -1] == 0).all())
