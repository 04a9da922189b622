"""A stand-in for a GPU: tensors that say they are on one, and that let the host look into them only by asking."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sirius.kernels import attention, gpu, launch, reference
from sirius.kernels.activations import ACTIVATIONS
from sirius.kernels.reference import Weight
from sirius.runtime import capture

GPU = torch.device("cuda", 0)
ASKING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "_unique2", "unique_dim", "masked_select"}
TAKING_INDICES = {"index", "index_put", "index_put_"}
OF_ONE_PLACE = TAKING_INDICES | {"cat", "stack", "mm", "bmm", "addmm", "embedding", "gather", "scatter", "index_select"}


class OnGPU(Tensor):
    """A tensor of a GPU, which is behind the host; results of what is done with it are such tensors too."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=held.device
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def data(self) -> Tensor:
        return OnGPU(self.held)

    @data.setter
    def data(self, other: "OnGPU") -> None:
        Tensor.data.__set__(self, other)
        self.held = other.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor whose stand-in is gone")


def inside(value: object) -> object:
    return value.held if isinstance(value, OnGPU) else value


def there(value: object) -> object:
    return OnGPU(value) if isinstance(value, Tensor) else value


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """The kernel's result, 0 where index holds no neuron, -1."""
    if index is None:
        return reference.linear(x, weight, bias)
    return reference.linear(x, weight, bias, index.clamp(min=0)) * (index >= 0)


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    if index is None:
        return reference.project(z, weight, bias)
    return reference.project(z[..., index >= 0], weight, bias, index[index >= 0])


def gate(x: Tensor, gate: Weight, activation: str, index: Tensor | None = None) -> Tensor:
    return ACTIVATIONS[activation](linear(x, *gate))


def glu(x: Tensor, gate: Weight, up: Weight, activation: str, index: Tensor | None = None) -> Tensor:
    return ACTIVATIONS[activation](linear(x, *gate, index)) * linear(x, *up, index)


def up_rows(gated: Tensor, x: Tensor, up: Tensor, up_bias: Tensor | None, index: Tensor) -> Tensor:
    return gated[..., index] * linear(x, up, up_bias, index)


KERNELS = [linear, project, gate, glu, up_rows, reference.largest]


class StandIn(TorchDispatchMode):
    """Runs what is done with tensors on the GPU.

    answers  what the host asked, in order
    kernels  which were called
    captures  how many passes were captured
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[str] = []
        self.kernels: set[str] = set()
        self.captures, self.capturing = 0, False

    def ask(self, what: str) -> None:
        """Note that the host waits for the GPU."""
        self.send(what)
        self.answers.append(what)

    def send(self, what: str) -> None:
        """Refuse what goes between host and GPU while a graph is captured."""
        if self.capturing:
            raise RuntimeError(f"{what} while a graph is captured")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_gpu = [isinstance(each, OnGPU) for each in tensors]
        if any(on_gpu):
            self._check(func, args, tensors)
        device = kwargs.get("device")
        goes = any(on_gpu) if device is None or name.startswith("new_") else torch.device(device).type == "cuda"
        kwargs = kwargs | ({} if device is None else {"device": "cpu"})
        result = func(*tree_map(inside, args), **tree_map(inside, kwargs))
        if func._schema.is_mutable and on_gpu[:1] == [True] and result is tensors[0].held:
            return tensors[0]
        return tree_map(there, result) if goes else result

    def _check(self, func, args, tensors: list[Tensor]) -> None:
        """Refuse what a GPU refuses: tensors of the host, but numbers after the first operand, and what is copied."""
        name = func.overloadpacket.__name__
        masks = name in TAKING_INDICES and any(getattr(each, "dtype", None) == torch.bool for each in args[1])
        if masks or name in ASKING:
            self.ask(name)
        strangers = [each for each in tensors if not isinstance(each, OnGPU)]
        if name == "copy_" and strangers:
            assert isinstance(tensors[0], OnGPU), "copied to the host, where only fetch is to"
            self.send("copied from the host")
            return
        numbers = len(args) > 1 and all(each.ndim == 0 and each is not args[0] for each in strangers)
        assert not strangers or (numbers and name not in OF_ONE_PLACE), f"{func} of tensors on a GPU and on the host"

    def kernel(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return how a kernel is run here; all that it is given must be there."""

        @wraps(run)
        def called(*given: object) -> Tensor:
            tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
            assert all(isinstance(each, OnGPU) for each in tensors), f"{run} of tensors on the host"
            self.kernels.add(run.__name__)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return OnGPU(run(*tree_map(inside, given)))

        return called

    def capture(self, call, buffers):
        """Capture a pass as a `GraphCapture` does: by running it twice, the second time without a question."""
        first = call(**buffers).clone()
        self.capturing = True
        try:
            call(**buffers)
        finally:
            self.capturing = False
        self.captures += 1
        return first, lambda: call(**buffers)


class Moves(TorchFunctionMode):
    """Copies tensors from there to here, which is a question, and from here to there."""

    def __init__(self, standin: StandIn) -> None:
        super().__init__()
        self.standin = standin

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, Tensor.new_tensor):
            device = torch.device(kwargs.pop("device", args[0].device if func is Tensor.new_tensor else "cpu"))
            dtype = {"dtype": args[0].dtype} if func is Tensor.new_tensor else {}
            return self._to(torch.tensor(args[-1], **dtype | kwargs), device)
        if func is Tensor.cpu:
            return self._to(args[0], torch.device("cpu"))
        if func is not Tensor.to:
            return func(*args, **kwargs)
        given = [*args[1:], *(kwargs[key] for key in ("device", "dtype", "other") if key in kwargs)]
        like = next((each for each in given if isinstance(each, Tensor)), None)
        dtype = next((each for each in given if isinstance(each, torch.dtype)), None if like is None else like.dtype)
        device = next(
            (torch.device(each) for each in given if isinstance(each, (torch.device, str))),
            args[0].device if like is None else like.device,
        )
        x = args[0] if dtype is None else func(args[0], dtype)
        return self._to(x, device)

    def _to(self, x: Tensor, device: torch.device) -> Tensor:
        if x.device.type == device.type:
            return x
        if device.type == "cuda":
            self.standin.send("copied from the host")
            return OnGPU(x.clone())
        self.standin.ask("fetched")
        return x.held.clone()


def move(model: nn.Module) -> None:
    """Move a model to the stand-in."""
    for module in model.modules():
        for name, each in [*module._parameters.items(), *module._buffers.items()]:
            if each is not None:
                made = OnGPU(each.data)
                setattr(module, name, nn.Parameter(made, False) if name in module._parameters else made)


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Let a stand-in be the GPU of this process; plain PyTorch takes its kernels' place."""
    standin = StandIn()
    for module, kernel in [*((gpu, each) for each in KERNELS), (attention, reference.attend)]:
        monkeypatch.setattr(module, kernel.__name__, standin.kernel(kernel))
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(launch, "PLAIN", (*launch.PLAIN, OnGPU))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu", make=torch.Generator: make())
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: Mock(elapsed_time=lambda other: 1.0))
    monkeypatch.setattr(capture, "GraphCapture", lambda device: standin.capture)
    with standin, Moves(standin):
        yield standin
