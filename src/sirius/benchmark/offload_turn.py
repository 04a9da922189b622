"""A turn of `sirius bench offload`: one setting decodes one text, alone in its process."""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sirius.benchmark.decode import TimedSetting, Times, open_batch, prompt, step
from sirius.benchmark.memory import peak_bytes, swapped_bytes
from sirius.benchmark.timing import timed
from sirius.core import LONGEST, CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError
from sirius.model.limits import MOST_READ
from sirius.model.loading import Source, load_config, load_empty, load_model, quiet
from sirius.model.prepared import prepared_of
from sirius.offload.amounts import memory_of
from sirius.offload.budget import UNDRAFTED, Budget, chosen_dtype, load_within, reserved, transfer_speed
from sirius.offload.load import Transfer, find_weights, match
from sirius.offload.measure import ring_speed
from sirius.offload.plan import Plan
from sirius.offload.sizes import sizes_of
from sirius.offload.stream import Stream

HOST_SHARE = 0.8  # of the host's memory that accelerate may fill beside a GPU


@dataclass(frozen=True)
class Workload:
    """One text, decoded under a memory budget.

    folder   of the checkpoint
    dtype    its name, or "auto" for the checkpoint's
    threads  of the CPU
    budget   bytes of the device's memory
    link     the most bytes per second that cross the link, for a host's memory that is played by this machine's. None:
             weights come from the model's files, or with a GPU from the host's memory
    context  tokens of the prompt
    tokens   timed steps of a turn without a draft
    windows  timed windows of a turn with one, of `period` tokens
    """

    folder: str
    dtype: str
    device: str
    threads: int
    budget: int
    link: float | None
    context: int
    tokens: int
    windows: int
    period: int

    @property
    def longest(self) -> int:
        """The most tokens of the prompt and its text, in any setting; the first step or window is not timed."""
        return self.context + 1 + max(1 + self.tokens, (1 + self.windows) * self.period)


@dataclass(frozen=True)
class OffloadSetting:
    """A way to decode under a budget.

    draft      what drafts read; None: accelerate's own offload of the full model
    histogram  weights of 0, 1, ... K-1 accepted guesses of a window, played back; empty without a draft
    """

    name: str
    draft: SparsityConfig | None
    histogram: tuple[float, ...] = ()


@dataclass
class Turn:
    """What was measured in a turn, or several. Bytes are those of memory, seconds are those of timed rounds.

    rounds          seconds of each step or window
    drafts, checks  seconds of all drafts and of the check of each window
    streamed        bytes that a draft pass and a full pass copy over the link, by the plan
    moved           bytes that crossed the link in a round, the mean; None of accelerate, which does not tell
    links           bytes per second over the link before and after the rounds; None where nothing is streamed
    plan            None where nothing is streamed, and of accelerate
    peak            most bytes in use on the device; on a CPU all memory of the process, less `host`
    host            bytes of weights that are kept where the host's memory is played by this machine's
    text            the tokens
    """

    rounds: list[float] = field(default_factory=list)
    drafts: list[float] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)
    streamed: tuple[int, int] = (0, 0)
    moved: float | None = None
    links: tuple[float, float] | None = None
    plan: Plan | None = None
    peak: int | None = None
    host: int = 0
    swapped: int | None = None
    text: tuple[int, ...] = ()


def run_turn(workload: Workload, setting: OffloadSetting) -> Turn:
    """Load the model, decode the text, and return what was measured; see `Engine.load` for what is raised."""
    torch.set_num_threads(workload.threads)
    with quiet():
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what it is asked to do
        turn = _run_ours(workload, setting) if setting.draft is not None else _run_accelerate(workload)
    with suppress(OSError):  # the system does not tell
        turn.peak = peak_bytes(workload.device) - turn.host
        turn.swapped = swapped_bytes()
    return turn


def decode_in_memory(workload: Workload) -> tuple[int, ...]:
    """Return the text of the full model without a budget, as long as that of a turn without a draft."""
    torch.set_num_threads(workload.threads)
    with quiet():
        model = load_model(Source(workload.folder), workload.dtype, workload.device)
        _never_end(model)
        return _Text(Engine(model), workload, OffloadSetting("in memory", UNDRAFTED)).run(workload.tokens + 1)


def _run_ours(workload: Workload, setting: OffloadSetting) -> Turn:
    """Decode by our engine: the prompt and the first round, then the rounds that are timed."""
    host = True if workload.link is not None else None
    kind = {"host": host, "link": workload.link, "period": workload.period}
    budget = Budget(workload.budget, setting.draft, workload.longest, **kind)
    model, _, limit = load_within(Source(workload.folder).found(), workload.dtype, workload.device, budget)
    _never_end(model)
    made = prepared_of(model).matrix
    stream = made if isinstance(made, Stream) else None
    text = _Text(Engine(model, max_context=limit), workload, setting)
    before = _link(stream)
    text.run(1)
    began = stream.moved if stream else 0
    turn = text.timed_rounds(workload.windows if setting.histogram else workload.tokens)
    if stream is None or before is None:
        return turn
    plan = stream.planned.plan
    turn.moved = (stream.moved - began) / len(turn.rounds)
    turn.links = before, _link(stream) or before
    turn.plan, turn.streamed = plan, (plan.draft_streamed, plan.full_streamed)
    if workload.link is not None:
        turn.host = stream.elsewhere  # the link is from the memory that is measured
    return turn


class _Text:
    """A text that is decoded round by round."""

    def __init__(self, engine: Engine, workload: Workload, setting: OffloadSetting) -> None:
        correction = CorrectionConfig(workload.period) if setting.histogram else None
        timed_setting = TimedSetting(setting.name, setting.draft, correction)
        self.times, self.guesses, self.device = Times(), timed_setting.guesses, workload.device
        self.batch = open_batch(engine, timed_setting, setting.histogram, self.times)
        tokens = prompt(engine.model, workload.context)
        self.batch.add(engine.text(tokens, max_new_tokens=workload.longest - workload.context, stop=()))
        self.tokens: list[int] = []
        self.read = False

    def run(self, rounds: int) -> tuple[int, ...]:
        """Read the prompt, if that is to be done, and decode some rounds; return the text so far."""
        for _ in range(rounds + (not self.read)):
            [update] = step(self.batch)
            self.tokens += update.round.tokens
        self.read = True
        return tuple(self.tokens)

    def timed_rounds(self, rounds: int) -> Turn:
        """Decode rounds and return their times and the text."""
        del self.times.drafts[:], self.times.checks[:]
        seconds = [timed(lambda: self.run(1), self.device)[0] for _ in range(rounds)]
        return Turn(seconds, self.times.drafts, self.times.checks, text=tuple(self.tokens))


def _link(stream: Stream | None) -> float | None:
    """Return the bytes per second that come over the link, through the buffers that are there."""
    return None if stream is None else ring_speed(stream.ring, stream.full)


def _never_end(model: PreTrainedModel) -> None:
    """Let no token end a text, as random texts may have any."""
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    cast("Any", model.config.get_text_config()).eos_token_id = None


def _run_accelerate(workload: Workload) -> Turn:
    """Decode the full model by transformers' `generate`, with what does not fit offloaded by accelerate."""
    before = _checkpoint_speed(workload)
    folder, limits = Path(workload.folder), _accelerates_memory(workload)
    with TemporaryDirectory() as spare:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_named_dtype(workload), device_map="auto", max_memory=limits, offload_folder=spare
        )
        _never_end(model)
        away = sum(each.nbytes for each in model.parameters() if each.is_meta)
        on_disk = "disk" in getattr(model, "hf_device_map", {}).values()  # there is none where all fits
        clock = _UncachedClock([folder, Path(spare)] if on_disk else [])
        ids = torch.tensor([prompt(model, workload.context)], device=workload.device)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=workload.tokens + 2,
                do_sample=False,
                streamer=clock,
                pad_token_id=0,
            )
        turn = Turn(clock.seconds[2:], streamed=(0, away), text=tuple(clock.tokens))
    if away:
        turn.links = before, _checkpoint_speed(workload)
    return turn


def _named_dtype(workload: Workload) -> Any:
    source = Source(workload.folder)
    return chosen_dtype(workload.dtype, load_config(source), find_weights(source))


def _accelerates_memory(workload: Workload) -> dict[int | str, int]:
    """Return the bytes that accelerate may fill with weights, by place: what our engine has for them too."""
    config, device = load_config(Source(workload.folder)), torch.device(workload.device)
    held = reserved() if device.type == "cpu" else 0
    slots = workload.longest + LONGEST
    sizes = sizes_of(config, _named_dtype(workload), UNDRAFTED, slots, MOST_READ, held)
    room = workload.budget - sizes.cache - sizes.working - sizes.process
    if room <= 0:
        raise ConfigError(f"a budget of {workload.budget} bytes leaves no room for weights; raise it")
    if device.type == "cpu":
        return {"cpu": room}
    return {device.index or 0: room, "cpu": int(HOST_SHARE * memory_of(torch.device("cpu")))}


def _checkpoint_speed(workload: Workload) -> float:
    """Return the bytes per second at which our engine would bring the checkpoint's blocks."""
    source, device = Source(workload.folder).found(), torch.device(workload.device)
    model = load_empty(source, load_config(source), _named_dtype(workload))
    where = match(source, model, find_weights(source))
    return transfer_speed(model, where, Transfer(device, from_host=device.type == "cuda"))


class _UncachedClock(BaseStreamer):
    """Notes the seconds of each pass of transformers' `generate`, and its tokens.

    Before each pass files are dropped from the system's cache: a machine with no more memory than the budget would
    have no room for them there. What is still mapped into memory stays.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.began: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then the token of each pass."""
        if self.began is not None:
            self.seconds.append(perf_counter() - self.began)
            self.tokens += value.flatten().tolist()
        for path in _weights(self.folders):
            drop_cached(path)
        self.began = perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


def _weights(folders: list[Path]) -> Iterator[Path]:
    """Yield files of weights, accelerate's own among them."""
    for folder in folders:
        yield from [*folder.glob("*.safetensors"), *folder.glob("*.dat")]


def drop_cached(path: Path) -> None:
    """Drop a file from the system's cache, where the system can do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # only what is on the disk can be dropped
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
