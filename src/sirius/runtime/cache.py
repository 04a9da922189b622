"""One KV cache for draft and full model: fixed slots, a length for each row, and no row's text ever copied aside.

    row 0   [0 ............ length[0])  held      [length[0] ....... slots)  free, may be written at any time
    row 1   [0 ...... length[1])  held      [length[1] ............. slots)  free

`locate` checks which slots the tokens of a pass go to, and the pass carries them. In it transformers' attention layers
write those slots (`update`) and are handed every slot below `visible`; the mask says which of them each token sees. A
pass takes a run of neighbouring rows, so that attention is handed a view and no copy.
"""

from contextlib import suppress

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sirius.kernels import ops
from sirius.model.prepared import Prepared, Slots
from sirius.shortage import SHORTAGE


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
        """Write states [B, heads, T, head_dim] to the slots of the pass at hand; return all visible ones like that."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, seen = self.table.slots_now(), []
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            ops.put(store, slots.rows, slots.written, states.transpose(1, 2))
            seen.append(store[slots.first : slots.first + len(states), : slots.visible].transpose(1, 2))
        return seen[0], seen[1]

    @property
    def stores(self) -> tuple[Tensor, ...]:
        """Keys and values, or nothing before the first write."""
        return (self.keys, self.values) if self.keys is not None and self.values is not None else ()

    def grow(self, rows: int, slots: int) -> None:
        """Move what is held into a larger store, unless an earlier call that ended midway did so here."""
        larger = []
        for store in self.stores:
            rows, slots = max(rows, store.shape[0]), max(slots, store.shape[1])
            if store.shape[:2] == (rows, slots):
                return
            new = store.new_zeros(rows, slots, *store.shape[2:])
            new[: store.shape[0], : store.shape[1]] = store
            larger.append(new)
        if larger:
            self.keys, self.values = larger

    def shrink(self, rows: int, slots: int) -> None:
        """Give back what is beyond so many rows and slots, where memory lets it."""
        with suppress(*SHORTAGE):  # the store stays as it is then
            for name in ("keys", "values"):
                if (store := getattr(self, name)) is not None and store.shape[:2] != (rows, slots):
                    setattr(self, name, store[:rows, :slots].clone())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots a pass sees, and the first of them."""
        return self.table.slots_now().visible, 0

    def get_seq_length(self) -> int:
        """Return the length of the longest row."""
        return int(self.table.lengths.max())

    def get_max_length(self) -> int:
        """Return the number of slots of a row."""
        return self.table.slots


class SlotTable:
    """How many slots each row has filled, shared by all layers.

    lengths    [B] int64     filled slots of each row, on the host
    every_row  [B, 1] int64  the numbers of the rows, on the model's device
    """

    def __init__(self, rows: int, slots: int, device: torch.device, prepared: Prepared) -> None:
        self.rows, self.slots, self.device, self.prepared = rows, slots, device, prepared
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.every_row = torch.arange(rows, device=device)[:, None]

    def slots_now(self) -> Slots:
        """Return where the pass at hand writes."""
        now = self.prepared.now()
        assert now is not None, "this cache is written in passes of a session alone"
        return now.slots


class SlotCache(Cache):
    """A static cache in transformers' shape whose rows advance, go back and are rewritten each on their own."""

    def __init__(self, layers: int, rows: int, slots: int, device: torch.device, prepared: Prepared) -> None:
        """Open a cache whose passes run on the model of `prepared`."""
        self.table = SlotTable(rows, slots, device, prepared)
        self.slot_layers = [SlotLayer(self.table) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))

    @property
    def lengths(self) -> Tensor:
        """Filled slots of each row, [B] int64 on the host."""
        return self.table.lengths

    @property
    def nbytes(self) -> int:
        """The bytes of all slots' keys and values."""
        return sum(store.nbytes for layer in self.slot_layers for store in layer.stores)

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for at least that many rows and slots; keys and values that are held remain."""
        table = self.table
        if rows <= table.rows and slots <= table.slots:
            return
        rows, slots = max(rows, table.rows), max(slots, table.slots)
        try:
            for layer in self.slot_layers:
                layer.grow(rows, slots)
        except BaseException:  # memory that ran out: a smaller size may do yet
            for layer in self.slot_layers:
                layer.shrink(table.rows, table.slots)
            raise
        table.lengths = torch.cat([table.lengths, table.lengths.new_zeros(rows - table.rows)])
        table.rows, table.slots = rows, slots
        table.every_row = torch.arange(rows, device=table.device)[:, None]

    def shrink(self, rows: int, slots: int) -> None:
        """Give back what is beyond so many rows and slots; what is held must be within them."""
        table = self.table
        rows, slots = min(rows, table.rows), min(slots, table.slots)
        assert not table.lengths[rows:].any() and not (table.lengths > slots).any(), "rows hold more than would be left"
        for layer in self.slot_layers:
            layer.shrink(rows, slots)
        table.lengths = table.lengths[:rows].clone()
        table.rows, table.slots, table.every_row = rows, slots, table.every_row[:rows].clone()

    def locate(self, slots: Tensor, first: int = 0) -> Slots:
        """Return the slots [b, T] int64 of rows first .. first + b for a pass to write; lengths stay as they are.

        Raises ValueError where there are no such rows or slots.
        """
        table = self.table
        last = first + slots.shape[0]
        if last > table.rows or slots.numel() == 0:
            raise ValueError(f"slots must be [rows, T] of rows {first}..{table.rows}; got {list(slots.shape)}")
        if int(slots.min()) < 0 or int(slots.max()) >= table.slots:
            raise ValueError(f"slots {int(slots.min())}..{int(slots.max())} do not fit a cache of {table.slots}")
        visible = int(torch.maximum(table.lengths[first:last].max(), slots.max() + 1))
        return Slots(table.every_row[first:last], slots.to(table.device, non_blocking=True), first, visible)

    def clear(self) -> None:
        """Let every row hold nothing."""
        self.table.lengths = torch.zeros_like(self.table.lengths)

    def advance(self, row: int, length: int) -> None:
        """Count a row's slots as filled up to a length."""
        self._set(row, length, at_least=int(self.lengths[row]), at_most=self.table.slots)

    def truncate(self, row: int, length: int) -> None:
        """Cut a row back to a length; the slots after it are free at once."""
        self._set(row, length, at_least=0, at_most=int(self.lengths[row]))

    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Gather scattered slots: row b holds, after what it holds, those length[b] + path[b, :counts[b]] away.

        path    [b, n] int64  offsets after the row's length; those from counts[b] on are passed over
        counts  [b] int64

        A tree's winning branch stands in slots of its own; after this it stands where a chain's tokens would.
        """
        table, (rows, most) = self.table, path.shape
        lengths = table.lengths[:rows]
        targets = torch.arange(most).expand(rows, most)
        kept = targets < counts[:, None]
        first = torch.where(kept[:, :1], path[:, :1], 0)
        path, targets = torch.where(kept, path, first), torch.where(kept, targets, 0)  # the rest repeats the first
        if rows > table.rows or bool((path < 0).any() | (counts > most).any() | (counts < 0).any()):
            raise ValueError(
                f"a path of {list(path.shape)}, {counts.tolist()} long, fits no cache of {table.rows} rows"
            )
        if most and int((lengths + path.max(1).values).max()) >= table.slots:
            raise ValueError(f"offsets up to {int(path.max())} after {lengths.tolist()} pass {table.slots} slots")
        if not torch.equal(path, targets):
            taken, given = ((lengths[:, None] + at).to(table.device, non_blocking=True) for at in (path, targets))
            index = torch.arange(rows, device=table.device)[:, None]
            for layer in self.slot_layers:
                for store in layer.stores:
                    store[index, given] = store[index, taken]
        table.lengths = torch.cat([lengths + counts, table.lengths[rows:]])

    def move(self, source: int, target: int) -> None:
        """Let row `target` hold what row `source` held, which is empty afterwards.

        Freed slots are zeros again: masked ones weigh nothing in attention, but nothing times NaN is NaN.
        """
        length = int(self.lengths[source])
        for layer in self.slot_layers:
            for store in layer.stores:
                if source != target:
                    store[target, :length] = store[source, :length]
                    store[target, length:] = 0
                store[source] = 0
        self.lengths[target] = length
        self.lengths[source] = 0

    def share(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` slots of a row to another row; lengths stay as they are."""
        if not 0 <= count <= int(self.lengths[source]):
            raise ValueError(f"row {source} holds {int(self.lengths[source])} slots, and {count} were asked for")
        for layer in self.slot_layers:
            for store in layer.stores:
                store[target, :count] = store[source, :count]

    def copy(self, slots: Slots, count: int) -> list[Tensor]:
        """Return a copy of the first `count` slots of each row of a pass, of every layer's keys and values."""
        at = slots.rows, slots.written[:, :count]
        return [store[at].clone() for layer in self.slot_layers for store in layer.stores]

    def paste(self, slots: Slots, count: int, copies: list[Tensor]) -> None:
        """Write back what `copy` returned."""
        stores = (store for layer in self.slot_layers for store in layer.stores)
        for store, copied in zip(stores, copies, strict=True):
            store[slots.rows, slots.written[:, :count]] = copied

    def _set(self, row: int, length: int, at_least: int, at_most: int) -> None:
        if not at_least <= length <= at_most:
            raise ValueError(f"length {length} of row {row} is not within {at_least}..{at_most}")
        self.lengths[row] = length
