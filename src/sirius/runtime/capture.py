"""Passes of fixed shapes that are captured once and replayed.

On a GPU a replay is one launch in place of a thousand; on the CPU it is the kernels without the Python between them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from transformers import PreTrainedModel

from sirius.kernels import cpu, gpu
from sirius.kernels.launch import is_plain
from sirius.kernels.tape import Tape
from sirius.model.adopt import parts_of
from sirius.model.linear import MatrixLinear
from sirius.model.prepared import prepared_of
from sirius.shortage import SHORTAGE, ran_out

WARM = 2  # passes of a shape in one session before the next is captured; a text's last window comes once
TAPED = 16  # most tokens of a pass that is captured on a tape; more are bound by arithmetic
PATIENCE = 64  # passes without a use of a captured one, before another takes its place
COMPILER = "inductor"
SHAPES = 64  # shapes that are compiled: a draft step, and checks of each size, for batches of each size
NUMBERS = int, float, complex, str, type(None)
OWN = vars(nn.Module()).keys() - {"training"}  # attributes of modules that are PyTorch's own

Call = Callable[..., Tensor]
Inputs = Mapping[str, Tensor]
Replay = Callable[[], Tensor]
Capture = Callable[[Call, Inputs], tuple[Tensor, Replay | None]]  # the scores; None: it cannot be replayed


class NotCaptured(RuntimeError):
    """A pass cannot be captured in the way that was tried."""


class _Captured(NamedTuple):
    """A captured pass.

    buffers  the tensors that it reads its inputs from, by name
    replay   runs it again and returns the scores
    alive    other objects that it reads
    used     the number of the pass that used it last
    """

    buffers: dict[str, Tensor]
    replay: Replay
    alive: object
    used: int


class CapturedPasses:
    """The captured passes by key: all that decides which kernels a pass launches, and at which addresses.

    Inputs are copied into buffers that stay where they are. A result may be written over by the next pass of any key.

    capture  captures a pass; None: each pass is run as it comes
    """

    def __init__(self, most: int) -> None:
        """Keep up to `most` captured passes."""
        self.capture: Capture | None = None
        self.most = most
        self.counts: Counter[Hashable] = Counter()
        self.captured: dict[Hashable, _Captured] = {}
        self.once: set[Hashable] = set()  # keys of passes that cannot be replayed
        self.now = 0  # passes so far

    def run(self, key: Hashable, calls: tuple[Call, Call], inputs: Inputs, alive: object = None) -> Tensor:
        """Return a pass over inputs, replayed where one of that key was captured.

        calls  the pass, and the same compiled, which is what is captured where that is possible
        alive  what the pass reads besides
        """
        self.now += 1
        if key in self.captured:
            found = self.captured[key] = self.captured.pop(key)._replace(used=self.now)  # the last to be dropped
            for name, buffer in found.buffers.items():
                buffer.copy_(inputs[name])
            return found.replay()
        self.counts[key] += 1
        if self.capture is None or self.counts[key] <= WARM or key in self.once or self._busy():
            return calls[0](**inputs)
        return self._first(key, calls, inputs, alive)

    def begin(self) -> None:
        """Begin a session, which may use the captured passes of earlier ones."""
        self.counts.clear()
        self.once.clear()

    def forget(self) -> None:
        """Drop all captured passes, as tensors that they read have moved."""
        self.captured.clear()

    def _busy(self) -> bool:
        """Tell whether there is no room for a further one, as all that there are were used lately."""
        oldest = next(iter(self.captured.values()), None)
        return oldest is not None and len(self.captured) >= self.most and self.now - oldest.used < PATIENCE

    def _first(self, key: Hashable, calls: tuple[Call, Call], inputs: Inputs, alive: object) -> Tensor:
        """Capture a pass, compiled if that works, and return its result."""
        for call in dict.fromkeys(reversed(calls)):
            buffers = {name: each.clone() for name, each in inputs.items()}
            try:
                assert self.capture is not None
                scores, replay = self.capture(call, buffers)
            except NotCaptured as error:
                what = "captured" if call is calls[0] else "compiled"
                logging.getLogger("sirius").warning("this model's passes cannot be %s and run slower: %s", what, error)
                continue
            except SHORTAGE as error:
                if not ran_out(error):
                    raise
                self.forget()  # their memory may do for the pass itself
                break
            if replay is None:
                self.once.add(key)
                return scores
            if len(self.captured) >= self.most:
                self.captured.pop(next(iter(self.captured)))
            self.captured[key] = _Captured(buffers, replay, alive, self.now)
            return scores
        self.capture = None
        return calls[0](**inputs)


class GraphCapture:
    """Captures passes as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Call, buffers: Inputs) -> tuple[Tensor, Replay]:
        """Run a pass once, which also compiles and tunes what it launches, then capture it.

        Raises NotCaptured of a pass that asks the device something, or allocates in another way than through PyTorch.
        """
        try:
            return self._captured(call, buffers)
        except RuntimeError as error:
            if ran_out(error):
                raise
            raise NotCaptured(str(error)) from error

    def _captured(self, call: Call, buffers: Inputs) -> tuple[Tensor, Replay]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            first = call(**buffers).clone()
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                output = call(**buffers)
            finally:
                graph.capture_end()
        current.wait_stream(aside)

        def replay() -> Tensor:
            graph.replay()
            return output

        return first, replay


def capture_tape(call: Call, buffers: Inputs) -> tuple[Tensor, Replay | None]:
    """Run a pass on the CPU and capture it, which makes a replay call no module.

    There is nothing to replay where the pass has many tokens, or depends on more than its inputs' addresses.
    """
    if buffers["input_ids"].numel() > TAPED:
        return call(**buffers), None
    with Tape() as tape:
        output = call(**buffers)

    def replay() -> Tensor:
        tape.replay()
        return output

    return output, replay if tape.repeatable else None


def hooked(model: nn.Module) -> bool:
    """Tell whether any module of a model has forward hooks, or all modules have, which a replay would not call."""
    everywhere = _module._global_forward_hooks or _module._global_forward_pre_hooks
    return bool(everywhere) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def state_of(model: PreTrainedModel) -> list[object]:
    """Return what captured passes depend on: modules, their forwards and numbers, where weights lie, the configuration.

    A captured pass holds numbers, such as a norm's epsilon, as they were. The list holds on to no module.
    """
    modules = list(model.modules())
    kinds = [(id(module), type(module), id(vars(module).get("forward"))) for module in modules]
    held = [each for module in modules for part in (module._parameters, module._buffers) for each in part.values()]
    return [
        prepared_of(model).matrix,
        hooked(model),
        kinds,
        [_numbers(each) for each in (*modules, model.config, model.config.get_text_config())],
        [(_identity(each), each.dtype) for each in held if each is not None],
    ]


def _numbers(owner: object) -> list[tuple[str, object]]:
    """Return an object's attributes, as `_plain` has them."""
    return [(name, _plain(value)) for name, value in vars(owner).items() if name not in OWN]


def _plain(value: object) -> object:
    """Return a number, a text, or a container of these; of anything else which function or what type it is."""
    if isinstance(value, NUMBERS):
        return value
    if isinstance(value, dict):
        return [(key, _plain(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return id(value) if callable(value) else type(value)


def _identity(weight: Tensor) -> int:
    """Return where a weight lies, or which object it is where it is no plain tensor and has no address."""
    return weight.data_ptr() if is_plain(weight) else id(weight)


def capture_of(model: PreTrainedModel) -> Capture | None:
    """Return the way to capture a model's passes on its device, None where there is none."""
    placed = prepared_of(model).placed is not None  # its passes are not captured, those of a draft may be
    if not placed and not all(layer.matrix.replayable for _, layer in parts_of(model, MatrixLinear)):
        return None
    on_gpu = model.device.type == "cuda"
    if not on_gpu and (gpu.runs_on(model.device) or not cpu.runs_on(model.device, model.dtype)):
        return None
    if hooked(model):
        logging.getLogger("sirius").warning("this model has hooks, so that its passes are not captured and run slower")
        return None
    return GraphCapture(model.device) if on_gpu else capture_tape


def compile_model(model: PreTrainedModel) -> Callable[..., Any]:
    """Return a model's forward, compiled for each shape that it meets; between its matrix products little is left."""
    torch.compiler.assume_constant_result(gpu.runs_on)  # not to be traced into: it imports
    compiled = torch.compile(model.forward, dynamic=False, backend=COMPILER)

    def forward(*args: object, **kwargs: object) -> object:
        with torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=8 * SHAPES):
            return compiled(*args, **kwargs)

    return forward
