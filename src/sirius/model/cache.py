"""One KV cache for draft and full model: fixed slots, a length for each row, and nothing ever copied aside.

    row 0   [0 ............ length[0])  held      [length[0] ....... slots)  free, may be written at any time
    row 1   [0 ...... length[1])  held      [length[1] ............. slots)  free

A pass says first which slots its tokens go to (`place`), then transformers' attention layers write them (`update`) and
see every slot below `visible`; the mask says which of those each token may look at.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """The slots of one attention layer: keys and values [B, S, heads, head_dim], allocated at the first write."""

    is_sliding = False

    def __init__(self, table: "SlotTable") -> None:
        super().__init__()
        self.table = table

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots like the first states; zeros, as masked slots must be finite."""
        rows, slots = self.table.rows, self.table.slots
        self.keys = key_states.new_zeros(rows, slots, key_states.shape[1], key_states.shape[3])
        self.values = value_states.new_zeros(rows, slots, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write states [B, heads, T, head_dim] to the placed slots; return all visible ones in the same layout."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            store[self.table.row_index, self.table.placed] = states.transpose(1, 2)
        seen = self.table.visible
        return self.keys[:, :seen].transpose(1, 2), self.values[:, :seen].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots a pass sees, and the first of them."""
        return self.table.visible, 0

    def get_seq_length(self) -> int:
        """Return the length of the longest row."""
        return int(self.table.lengths.max())

    def get_max_length(self) -> int:
        """Return the number of slots of a row."""
        return self.table.slots


class SlotTable:
    """Which slots the running pass writes, shared by all layers.

    lengths  [B] int64    filled slots of each row, on the host
    placed   [B, T] int64 where the running pass writes, on the model's device
    visible  slots below this one are handed to attention
    """

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        self.rows, self.slots = rows, slots
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.row_index = torch.arange(rows, device=device)[:, None]
        self.placed = torch.empty(rows, 0, dtype=torch.int64, device=device)
        self.visible = 0


class SlotCache(Cache):
    """A static cache in transformers' shape whose rows advance, go back and are rewritten each on their own."""

    def __init__(self, layers: int, rows: int, slots: int, device: torch.device) -> None:
        self.table = SlotTable(rows, slots, device)
        self.slot_layers = [SlotLayer(self.table) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    @property
    def lengths(self) -> Tensor:
        """Filled slots of each row, [B] int64 on the host."""
        return self.table.lengths

    def place(self, slots: Tensor) -> None:
        """Say where the next pass writes, slots [B, T] int64; a row's length does not change until `advance`."""
        table = self.table
        if slots.shape[0] != table.rows or slots.numel() == 0:
            raise ValueError(f"slots must be [{table.rows}, T] with T at least 1; got {list(slots.shape)}")
        if int(slots.min()) < 0 or int(slots.max()) >= table.slots:
            raise ValueError(f"slots {int(slots.min())}..{int(slots.max())} do not fit a cache of {table.slots}")
        table.placed = slots.to(table.row_index.device)
        table.visible = int(torch.maximum(table.lengths.max(), slots.max() + 1))

    def advance(self, lengths: Tensor) -> None:
        """Count slots as filled, up to lengths [B] int64."""
        self._set(lengths, at_least=self.lengths, at_most=torch.full_like(self.lengths, self.table.slots))

    def truncate(self, lengths: Tensor) -> None:
        """Cut every row back to lengths [B] int64; the slots after are free at once."""
        self._set(lengths, at_least=torch.zeros_like(self.lengths), at_most=self.lengths)

    def keep(self, path: Tensor, lengths: Tensor) -> None:
        """Gather scattered slots: row b's path[b] [B, n] int64 becomes its slots lengths[b] .. lengths[b] + n.

        A tree's winning branch stands in slots of its own; after this it stands where a chain's tokens would, and the
        rows' lengths are lengths + n.
        """
        rows, count = path.shape
        to = lengths[:, None] + torch.arange(count)
        slots = self.table.slots
        if rows != self.table.rows or bool(((path < 0) | (path >= slots)).any()):
            raise ValueError(f"path must hold slots below {slots} for {self.table.rows} rows")
        if bool(((lengths > self.lengths) | (lengths + count > slots)).any()):
            raise ValueError(
                f"lengths {lengths.tolist()} + {count} do not fit {self.lengths.tolist()} of {slots} slots"
            )
        device = self.table.row_index.device
        path_at, to_at = path.to(device), to.to(device)
        for layer in self.slot_layers:
            for store in (layer.keys, layer.values):
                if store is not None:
                    store[self.table.row_index, to_at] = store[self.table.row_index, path_at]
        self.table.lengths = lengths + count

    def check_integrity(self) -> None:
        """Raise AssertionError where the book-keeping and the stored tensors disagree."""
        table = self.table
        assert table.lengths.shape == (table.rows,), f"{list(table.lengths.shape)} lengths for {table.rows} rows"
        assert bool(((table.lengths >= 0) & (table.lengths <= table.slots)).all()), f"lengths {table.lengths.tolist()}"
        for index, layer in enumerate(self.slot_layers):
            for store in (layer.keys, layer.values):
                if store is None:
                    continue
                assert store.shape[:2] == (table.rows, table.slots), f"layer {index} holds {list(store.shape)}"
                for row, length in enumerate(table.lengths.tolist()):
                    assert bool(store[row, :length].isfinite().all()), f"layer {index}, row {row} holds no numbers"

    def _set(self, lengths: Tensor, at_least: Tensor, at_most: Tensor) -> None:
        if lengths.shape != self.lengths.shape or bool(((lengths < at_least) | (lengths > at_most)).any()):
            raise ValueError(
                f"lengths {lengths.tolist()} are not within {at_least.tolist()}..{at_most.tolist()}, row by row"
            )
        self.table.lengths = lengths.clone()
