"""The lm-evaluation-harness model `sirius`: its texts are decoded our way, its log-probabilities are the full model's.

`lm_eval --model sirius` finds it where lm-eval loads plug-ins; otherwise import this module first.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from sirius.core import SamplingConfig
from sirius.demo.embedded import FOLDER, check_embedded
from sirius.engine import Completion, Engine, TextOptions
from sirius.errors import ConfigError, SiriusError
from sirius.evaluation.catalogue import setting_for
from sirius.evaluation.completions import Completions, key_of
from sirius.evaluation.fingerprint import fingerprint
from sirius.evaluation.ranks import Ranks
from sirius.evaluation.within import budget_for_tasks
from sirius.settings import Setting, make_setting
from sirius.stats import Stats, combine

EMBEDDED = "embedded"
NO_LIMIT = 2**20  # tokens of a context that has none
NEW_TOKENS = 256  # of a task that does not say, as in lm-eval's own models
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
PASSED_OVER = {"do_sample", "until", "max_gen_toks", "num_beams", "use_cache"}
GenerationRequest = tuple[str, dict[str, Any]]  # a prompt, and the options that lm-eval gives for its text
EncodedRequest = tuple[tuple[int, ...], dict[str, Any]]  # the tokens of a prompt, and the options of `Engine.generate`
TOGETHER = 16  # batches of given texts that are sorted by their length, between two looks at the clock
log = logging.getLogger(__name__)


class SiriusLM(TemplateLM):
    """A model of transformers, decoded by sirius.

    Samples of several processes (`torchrun`, `accelerate launch`) are shared out and gathered, as lm-eval does it.
    """

    def __init__(  # noqa: PLR0913 - lm-eval hands over options by their names
        self,
        pretrained: str | Engine = EMBEDDED,
        *,
        batch_size: int | str = 8,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
        max_context: int | None = None,
        memory_budget: int | str | None = None,
        threads: int | None = None,
        max_gen_toks: int = NEW_TOKENS,
        completions: str | Path | Completions | None = None,
        ranks: Ranks | None = None,
        quiet: bool = False,
        name: str | None = None,
        max_batch_size: int | None = None,
        **setting: Any,
    ) -> None:
        """Load a model.

        pretrained   a folder, GGUF file or hub id, "embedded", or an engine that is there
        batch_size   texts decoded side by side; "auto" is 8
        memory_budget  of each process: bytes, "8GiB" or "50%", planned for the setting's draft and `batch_size` texts
        completions  a folder in which finished samples are saved and found again
        ranks        the processes that share the work; None: as the environment says
        quiet        show no progress
        name         of the model in results; None: `pretrained`, or where an engine came from
        setting      options of sparsity and correction, by the names of `sirius generate`

        Raises SiriusError where the model cannot be loaded or an option is none.
        """
        super().__init__()
        self.values, self.setting = setting, make_setting(setting)
        self.batch_size, self.max_gen_toks = _batch_size(batch_size), max_gen_toks
        self.ranks = Ranks.here() if ranks is None else ranks
        self.ranks.wait()  # they meet before their shares take hours
        if threads is not None:
            torch.set_num_threads(int(threads))
        load: dict[str, Any] = {"dtype": dtype, "revision": revision, "max_context": max_context}
        load |= {"trust_remote_code": trust_remote_code, "gguf_file": gguf_file}
        load["memory_budget"] = memory_budget and budget_for_tasks(memory_budget, setting, self.batch_size)
        self.engine = _engine(pretrained, self.ranks.device(_device(device)), load)
        if self.engine.tokenizer is None:
            raise ConfigError("lm-eval's tasks are texts, and this model has no tokenizer")
        self.tokenizer: Any = self.engine.tokenizer
        place = pretrained if isinstance(pretrained, str) else self.engine.model.config.name_or_path
        self.name = str(place if name is None else name)
        self._rank, self._world_size = self.ranks.rank, self.ranks.size
        self.quiet = quiet or self._rank > 0
        self._device = torch.device("cpu")  # where `all_gather` wants its tensors
        self.completions = _completions(completions, self._rank)
        self.identity = {"model": self.name, "revision": revision, "dtype": str(self.engine.model.dtype)}
        self.identity |= {"ends": sorted(self.engine.ends)} | ({} if gguf_file is None else {"gguf_file": gguf_file})
        if self.completions is not None:
            self.completions.check_model(json.dumps(self.identity), fingerprint(self.engine.model))
        self.tokens: dict[str, list[int]] = {}  # of prompts
        self.stats: dict[str, list[Mapping[str, Any]]] = {}  # by task, on rank 0

    # --- lm-eval's questions about the model

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.tokenizer.eos_token_id
        return next(iter(self.engine.ends)) if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text of which every token is scored."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """The model's name, for lm-eval's cache of requests."""
        return self.name.replace("/", "__")

    @property
    def max_length(self) -> int:
        """The most tokens of a text with its prompt."""
        return self.engine.limit or NO_LIMIT

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval stores with the results: the setting, and what its texts came to."""
        return {
            "sirius": self.setting.flat(),
            "sirius_tasks": {
                task: {
                    **(setting := setting_for(task, self.values)).flat(),
                    "lossless": setting.lossless,
                    **figures(stats),
                }
                for task, stats in self.stats.items()
            },
            "model_dtype": str(self.engine.model.dtype),
            "model_num_parameters": self.engine.model.num_parameters(),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; a text that begins with the first token of texts does not get another."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as a text by the model's template; raise ConfigError where it has none, or refuses them."""
        if not self.tokenizer.chat_template:
            raise ConfigError("this model's tokenizer has no chat template; leave out --apply_chat_template")
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is a program that came with the checkpoint: it may raise anything
            raise ConfigError(f"the model's chat template refuses these messages: {error!r}") from error

    # --- lm-eval's processes

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, one after the other."""
        return self.ranks.gather_tensor(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """Return the objects of all ranks on rank `dst`, None elsewhere."""
        return self.ranks.gather(obj, dst)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.ranks.wait()

    # --- what lm-eval asks for

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text of each request, cut before its stop strings."""
        groups: dict[str | None, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(place)
        texts = [""] * len(requests)
        for task, places in groups.items():
            setting = setting_for(task or "", self.values)
            asked = [cast("GenerationRequest", requests[place].args) for place in places]
            with tqdm(total=len(asked), desc=setting.label(), disable=disable_tqdm or self.quiet) as bar:
                samples = [each for each in self.samples(asked, setting, on_sample=bar.update) if each is not None]
            for place, sample in zip(places, samples, strict=True):
                texts[place] = sample["text"]
            own = {id(sample): sample["stats"] for sample in samples}  # of equal prompts one is decoded
            for stats in self.gather_object([*own.values()]) or []:
                self.stats.setdefault(task or "", []).extend(stats)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def samples(
        self,
        requests: Sequence[GenerationRequest],
        setting: Setting,
        *,
        share: tuple[int, int] = (0, 1),
        on_sample: Callable[[], object] = lambda: None,
    ) -> list[dict[str, Any] | None]:
        """Return what becomes of each prompt: its text, number of tokens, end and figures.

        share      (first, n): this process decodes every n-th prompt, from the first on. Of the others it returns what
                   is known, or None
        on_sample  called after each text that is decoded

        Samples that `completions` holds are not decoded again. Raises SiriusError of a prompt that cannot be decoded.
        """
        texts, keys = self._texts(requests, setting)
        found = {} if self.completions is None else self.completions.found
        wanted = dict(zip(keys, texts, strict=True))  # without those that are asked for twice
        todo = [key for key in list(wanted)[share[0] :: share[1]] if key not in found]
        own: dict[str, dict[str, Any]] = {}
        done = self.engine.generate_many(
            [wanted[key][0] for key in todo],
            each=[cast("TextOptions", wanted[key][1]) for key in todo],
            batch_size=self.batch_size,
            sparsity=setting.sparsity,
            correction=setting.correction,
        )
        for index, completion in done:
            if isinstance(completion, SiriusError):
                raise completion
            key = todo[index]
            own[key] = self._sample(completion, wanted[key][1]["stop"])
            if self.completions is not None:
                self.completions.add(key, own[key])
            on_sample()
        known = {**found, **own}
        return [known.get(key) for key in keys]

    def keys(self, requests: Sequence[GenerationRequest], setting: Setting) -> list[str]:
        """Return the key of each prompt's sample."""
        return self._texts(requests, setting)[1]

    def _texts(self, requests: Sequence[GenerationRequest], setting: Setting) -> tuple[list[EncodedRequest], list[str]]:
        """Return the tokens of each prompt with the options of its text, and the keys of their samples.

        A prompt that is too long loses its beginning, as with lm-eval's own models.
        """
        seen: Counter[str] = Counter()
        texts: list[EncodedRequest] = []
        cut, eos = 0, self.tokenizer.decode([self.eot_token_id])
        for prompt, options in requests:
            given: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            budget, room = int(given["max_gen_toks"]), self.max_length - int(given["max_gen_toks"])
            if room < 1:
                raise ConfigError(f"max_gen_toks {budget} leaves no room in the model's context of {self.max_length}")
            if (tokens := self.tokens.get(prompt)) is None:
                tokens = self.tokens[prompt] = self.tok_encode(prompt)  # every setting asks the same prompts
            cut = max(cut, len(tokens) - room)
            stop = [each for each in handle_stop_sequences(list(given["until"]), eos) if each]
            sampling = _sampling_of(given)
            if sampling["temperature"] > 0 and sampling.get("seed") is None:
                sampling["seed"] = seen[prompt]  # copies of a prompt are texts of their own
                seen[prompt] += 1
            texts.append((tuple(tokens[-room:]), {"max_new_tokens": budget, "stop": stop, "sampling": sampling}))
        if cut:
            log.warning("prompts that leave no room for their new tokens lose their beginning, up to %d tokens", cut)
        return texts, [key_of(*each, {**setting.flat(), **self.identity}) for each in texts]

    def _sample(self, completion: Completion, stops: Sequence[str]) -> dict[str, Any]:
        """Return what is kept of a text, which reads as lm-eval's own models write it."""
        text = postprocess_generated_text(
            self.tokenizer.decode(completion.token_ids, skip_special_tokens=True), list(stops), None
        )
        finished = {"tokens": len(completion.token_ids), "finish": completion.finish_reason}
        return {"text": text, **finished, "stats": asdict(completion.stats)}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, every token with as much before it as the context holds."""
        found = []
        for request in tqdm(requests, desc="log-probabilities", disable=disable_tqdm or self.quiet):
            found.append(self._rolling(*request.args))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _rolling(self, text: str) -> float:
        tokens, first = self.tok_encode(text), self.prefix_token_id
        windows = get_rolling_token_windows(tokens, first, self.max_length, context_len=1)
        pairs = [make_disjoint_window(each) for each in windows]
        return sum(each.total for each in self.engine.score(pairs, batch_size=self.batch_size))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(before, after) for _, before, after in requests]
        cut = [(before[max(0, len(before) + len(after) - 1 - self.max_length) :], after) for before, after in pairs]
        found: list[tuple[float, bool]] = []
        begins = range(0, len(cut), TOGETHER * self.batch_size)
        for begin in tqdm(begins, desc="log-probabilities", disable=bool(kwargs.get("disable_tqdm")) or self.quiet):
            end = begin + TOGETHER * self.batch_size
            scored = self.engine.score(cut[begin:end], batch_size=self.batch_size)
            found += [(each.total, all(each.greedy)) for each in scored]
            for (texts, _, _), answer in zip(requests[begin:end], found[begin:end], strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found


register_model("sirius")(SiriusLM)


def figures(stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of several texts together, from those of each."""
    lossless = all(each["lossless"] for each in stats)  # texts of several devices may differ in it
    common = [{**each, "acceptance_histogram": tuple(each["acceptance_histogram"])} for each in stats]
    return asdict(combine([Stats(**{**each, "lossless": lossless}) for each in common]))


def _sampling_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling that lm-eval's options ask for; raise ConfigError of those that are not honoured."""
    if unknown := sorted(given.keys() - PASSED_OVER - set(SAMPLING)):
        raise ConfigError(
            f"the model sirius does not honour {', '.join(unknown)} in gen_kwargs; it knows {', '.join(SAMPLING)}"
        )
    if given.get("num_beams", 1) != 1:
        raise ConfigError(f"beam search is not honoured (num_beams {given['num_beams']}); leave it out")
    own = {name: given[name] for name in SAMPLING if given.get(name) is not None}
    hot = given.get("do_sample") and given.get("temperature", 1.0) > 0
    own["temperature"] = float(given.get("temperature", 1.0)) if hot else 0.0
    SamplingConfig(**own)
    return own


def _engine(pretrained: str | Engine, device: str, options: Mapping[str, Any]) -> Engine:
    if isinstance(pretrained, Engine):
        return pretrained
    if pretrained == EMBEDDED:
        check_embedded()
    return Engine.load(str(FOLDER) if pretrained == EMBEDDED else pretrained, device=device, **options)


def _completions(given: str | Path | Completions | None, rank: int) -> Completions | None:
    return Completions(Path(given), rank) if isinstance(given, str | Path) else given


def _device(device: str | None) -> str:
    """Return the device; lm-eval's own default is the first GPU, there or not."""
    return "auto" if device in (None, "cuda:0") else device


def _batch_size(given: int | str) -> int:
    if str(given).split(":")[0] == "auto":
        return 8
    if not str(given).isdigit() or int(given) < 1:
        raise ConfigError(f"batch_size is a whole number of at least 1, or auto; got {given!r}")
    return int(given)
