"""Passes of fixed shapes, recorded on a GPU once and replayed: one launch in place of a thousand."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

WARM = 2  # passes of a shape in one session before it is worth a record; the last window of a text never is

COMPILER = "inductor"
SHAPES = 64  # of a draft step, checks of each size, for batches of each size: all are compiled for themselves

Call = Callable[..., Tensor]
Replay = Callable[[Call, Mapping[str, Tensor]], Tensor]
Record = Callable[[Call, Mapping[str, Tensor]], Replay]


class Passes:
    """What was recorded, by key: all that decides which kernels a pass launches, and at which addresses.

    Inputs are copied into buffers that stay where they are. A result is written over by the next pass of its key.
    """

    def __init__(self, record: Record | None) -> None:
        """Take what records a pass; None runs each as it comes."""
        self.record = record
        self.counts: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, tuple[dict[str, Tensor], Replay]] = {}

    def run(self, key: Hashable, call: Call, inputs: Mapping[str, Tensor], faster: Call) -> Tensor:
        """Return `call(**inputs)`, replayed where a pass of that key was recorded; `faster` is what a record is of."""
        if key not in self.recorded and not self._recordable(key, faster, inputs):
            return call(**inputs)
        buffers, replay = self.recorded[key]
        for name, buffer in buffers.items():
            buffer.copy_(inputs[name])
        return replay(faster, buffers)

    def begin(self) -> None:
        """Begin a session: what it does often is recorded, and what earlier ones did is there."""
        self.counts.clear()

    def forget(self) -> None:
        """Drop what was recorded, as something in it has moved."""
        self.recorded.clear()

    def _recordable(self, key: Hashable, call: Call, inputs: Mapping[str, Tensor]) -> bool:
        self.counts[key] += 1
        if self.record is None or self.counts[key] <= WARM:
            return False
        buffers = {name: each.clone() for name, each in inputs.items()}
        try:
            self.recorded[key] = buffers, self.record(call, buffers)
        except RuntimeError as error:
            logging.getLogger("sirius").warning("this model's passes cannot be recorded and run slower: %s", error)
            self.record = None
        return key in self.recorded


class GraphRecorder:
    """Records passes as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Call, buffers: Mapping[str, Tensor]) -> Replay:
        """Run a pass once to warm up and once to record it."""
        with torch.cuda.device(self.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                call(**buffers)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                output = call(**buffers)
        return partial(_replay, graph, output)


def _replay(graph: "torch.cuda.CUDAGraph", output: Tensor, call: Call, buffers: Mapping[str, Tensor]) -> Tensor:
    graph.replay()
    return output


def compile_model(model: PreTrainedModel) -> Callable[..., Any]:
    """Return a model's forward, compiled for each shape that it meets; between its matrix products little is left."""
    compiled = torch.compile(model.forward, dynamic=False, backend=COMPILER)

    def forward(*args: object, **kwargs: object) -> object:
        with torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=8 * SHAPES):
            return compiled(*args, **kwargs)

    return forward
