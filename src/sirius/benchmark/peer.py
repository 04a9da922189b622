"""llama.cpp beside us: the same weights, threads and context, in a process of its own, so that memory stays apart."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sirius.benchmark.convert import check_llama, write_gguf
from sirius.benchmark.extras import need
from sirius.benchmark.timing import timed
from sirius.errors import ConfigError, ModelError

NAME, PACKAGE = "llama.cpp", "llama-cpp-python"
TOLERANCE = {  # of the scores' difference, as a norm; its attention rounds to float16 inside, whatever the dtype
    torch.float32: 1e-2,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
CHECKED = 8, 4  # tokens of a prompt and steps after it, compared before anything is timed


@dataclass(frozen=True)
class Turn:
    """A prompt and greedy steps after it.

    tokens   the prompt's and those that the steps read
    scores   [V] float32 after the last of them
    seconds  of each step, choosing the next token included
    """

    tokens: list[int]
    scores: np.ndarray
    seconds: list[float]


class Peer:
    """llama.cpp at the other end of a pipe."""

    def __init__(self, connection: Connection) -> None:
        """Wait until it has read its model; raise ModelError where it cannot."""
        self.connection = connection
        self.features = self._answer()
        self.difference = float("nan")  # of its scores from ours

    @property
    def facts(self) -> dict[str, str | float]:
        """What its figures depend on besides, and how far its scores are from ours."""
        return {PACKAGE: version(PACKAGE), "features": self.features, "difference": self.difference}

    def turn(self, prompt: Sequence[int], steps: int) -> Turn:
        """Read a prompt anew and take greedy steps after it."""
        self.connection.send((list(prompt), steps))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError as error:
            raise ModelError("llama.cpp ended without an answer; it may have run out of memory") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def open_peer(model: PreTrainedModel, slots: int, threads: int) -> Iterator[Peer]:
    """Give llama.cpp a model's weights and room for so many tokens; it is gone when the context ends.

    Raises ConfigError where the model is no plain Llama on the CPU or a package is missing, ModelError where its scores
    differ from the model's by more than `TOLERANCE`.
    """
    check_llama(model.config, model.dtype)
    if model.device.type != "cpu":
        raise ConfigError(f"llama.cpp is timed on the CPU; the model is on {model.device}: set --device cpu")
    need("llama_cpp", "peer", "--peer llama.cpp")
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write_gguf(model, path)
        with open_file(path, slots, threads, wide=model.dtype == torch.float32) as peer:
            peer.difference = _checked_difference(model, peer)
            yield peer


@contextmanager
def open_file(path: Path, slots: int, threads: int, wide: bool) -> Iterator[Peer]:
    """Give llama.cpp a GGUF file and room for so many tokens; it is gone when the context ends.

    wide  keys and values are float32, otherwise float16

    Raises ModelError where it cannot read the file.
    """
    processes = get_context("spawn")  # a fork of a process with threads may never get on
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_serve, args=(theirs, str(path), slots, threads, wide), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Peer(ours)
    finally:
        ours.close()
        process.join()


@torch.inference_mode()
def _checked_difference(model: PreTrainedModel, peer: Peer) -> float:
    """Return the norm of the scores' difference over that of ours, after a prompt and single steps."""
    count, steps = CHECKED
    generator = torch.Generator().manual_seed(0)
    turn = peer.turn(torch.randint(model.config.vocab_size, (count,), generator=generator).tolist(), steps)
    ours = model(torch.tensor([turn.tokens])).logits[0, -1].float()
    difference = float((torch.from_numpy(turn.scores) - ours).norm() / ours.norm())
    if not difference <= TOLERANCE[model.dtype]:
        raise ModelError(
            f"llama.cpp's scores differ from ours by {difference:.2g} of their norm, and {TOLERANCE[model.dtype]:g} is "
            "what rounding explains; it does not run this model as transformers does"
        )
    return difference


class _LlamaCpp:
    """A model and its context in llama.cpp's own interface.

    Keys and values are float32 of a float32 model (`wide`) and float16 of others, which is llama.cpp's default.
    """

    def __init__(self, path: str, slots: int, threads: int, wide: bool) -> None:
        self.api = api = need("llama_cpp", "peer", "--peer llama.cpp")
        self.silent = api.llama_log_callback(lambda *_: None)  # must live as long as the library may call it
        api.llama_log_set(self.silent, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = slots
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = api.GGML_TYPE_F32 if wide else api.GGML_TYPE_F16
        self.context = self.model and api.llama_init_from_model(self.model, params)
        if not self.context:
            raise ModelError(f"llama.cpp cannot read the model, or has no memory for it with {slots} tokens")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def features(self) -> str:
        """Return the instructions that it was built with."""
        return self.api.llama_print_system_info().decode().strip()

    def turn(self, prompt: list[int], steps: int) -> Turn:
        """Read a prompt in the place of what is held, and take greedy steps after it."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        tokens, seconds, following = list(prompt), [], self._read(prompt)
        for _ in range(steps):
            tokens.append(following)
            took, following = timed(lambda: self._read(tokens[-1:]), "cpu")
            seconds.append(took)
        return Turn(tokens, self._scores().copy(), seconds)

    def _read(self, tokens: list[int]) -> int:
        """Read tokens after what is held; return the likeliest next one."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points to it
        if failed := self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens))):
            raise ModelError(f"llama.cpp failed to read {len(tokens)} tokens, with code {failed}")
        return int(self._scores().argmax())

    def _scores(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocabulary,))


def _serve(connection: Connection, path: str, slots: int, threads: int, wide: bool) -> None:
    """Answer turns until the other end is closed."""
    try:
        llama = _LlamaCpp(path, slots, threads, wide)
        connection.send(llama.features())
        while True:
            connection.send(llama.turn(*connection.recv()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except (ConfigError, ModelError) as error:
        connection.send(error)
