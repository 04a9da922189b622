"""The nouns of sirius: what is asked for, what a round of decoding did, and the one protocol decoding needs.

Letters of shapes, the same everywhere:
    B rows (prompts decoded side by side)    T tokens of one pass     S slots of the KV cache
    K period (tokens the full model reads in a check)                 V vocabulary
    L layers with a gated MLP                F neurons of an MLP      H hidden size
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from math import isfinite
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from sirius.errors import ConfigError

Ablation = Literal["rewrite", "interleave", "rollback"]
Origin = Literal["full", "draft", "correction", "bonus"]
FinishReason = Literal["stop", "length"]

AUTO = "auto"
PAPER = "paper"
OWN = ("lossless", "argmax", "sampling")  # rules under which nothing but the full model's own choice is accepted
THRESHOLD = 0.1  # of the other rules, where none is given
LONGEST = 32  # the longest window that period "auto" chooses
MOST_GUESSES = 1024  # of a check: it reads all of them in one pass, and each looks at every other one before it
COLDEST = 1e-5  # the lowest temperature above 0: scores divided by less overflow
DRAFT_BITS = (0, 4, 8, AUTO)  # of the weights that a draft reads; 0: the model's own
LONGEST_NGRAM = 16  # tokens of the longest match that prompt lookup may look for
SEEDS = 2**32  # as many as torch's generator on the CPU tells apart


class Mode(Enum):
    """How a pass runs the gated MLPs."""

    DENSE = "dense"  # every neuron
    SPARSE = "sparse"  # the neurons that the sparsity method chose


@dataclass(frozen=True)
class SparsityConfig:
    """What the draft model reads: which neurons, and how many bits of each weight.

    method      a registered name: "coarse" (alias "griffin"), "fine" (alias "cats"), "none", or a third party's
    keep        the fraction of neurons kept, 0 < keep <= 1 (the papers' `spr`)
    threshold   for methods that know one: keep the neurons with |act(gate)| above it, instead of a fixed fraction
    per_branch  methods per token: a set for each branch of a tree, instead of one that a step's branches share
    shared_set  methods per prompt: one set for all rows of a batch, by their mean score, instead of one for each row.
                Fewer weights are read, and a lossy text depends on what is decoded beside it
    refresh     methods per prompt: the share that a checked window gets in the prompt's statistic, 0 (off) to 1
    draft_bits  bits of the weights that the draft reads: 4, 8, "auto" (8 for a small model, else 4); 0: the model's own
    """

    method: str = "coarse"
    keep: float = 0.5
    threshold: float | None = None
    per_branch: bool = False
    shared_set: bool = False
    refresh: float = 0.0
    draft_bits: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        _check_kinds(self, method=str, keep=float, threshold=float | None, refresh=float)
        _check_kinds(self, per_branch=bool, shared_set=bool)
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep is the fraction of neurons kept, above 0 and at most 1; got {self.keep}")
        if self.threshold is not None and not self.threshold >= 0:
            raise ConfigError(f"the sparsity threshold bounds an absolute value, so at least 0; got {self.threshold}")
        if type(self.draft_bits) not in (int, str) or self.draft_bits not in DRAFT_BITS:
            raise ConfigError(f"draft_bits are 4, 8, 'auto', or 0 for the model's own weights; got {self.draft_bits!r}")
        if not 0 <= self.refresh <= 1:
            raise ConfigError(f"refresh is a share, from 0 (off) to 1; got {self.refresh}")


@dataclass(frozen=True)
class CorrectionConfig:
    """How the full model checks the draft. As it stands: lossless, and drafting only where that is faster.

    period              K, tokens that a branch of a check has: the newest one and K-1 drafted ones; 1 drafts nothing,
                        "auto" chooses it round by round from measured cost and acceptance
    accept              which guesses are accepted; the full model's own choice always is:
                        "lossless"   no other guess: the full model's greedy text, or its sample with a temperature
                        "argmax", "sampling"  the same by the names of its two cases; "argmax" refuses a temperature
                        "threshold"  probability at least `threshold` (the paper's rule; lossy)
                        "relative"   probability at least `threshold` times the largest (lossy)
                        "typical"    probability at least min(threshold, sqrt(threshold) exp(-entropy)) (lossy)
                        or a name registered with `sirius.decoding.register` (lossy). As with a sparsity method's name,
                        one that is not known is refused where it is first used
    threshold           see `accept`; None is 0.1. Refused beside a lossless rule, which has none
    accept_temperature  the temperature of those probabilities, and of the scores by which branches are ranked
    tree_width          w, branches drafted side by side
    draft_confidence    a chain ends after a guess to which the draft gives less probability, 0 to 1; 0 is off. On a GPU
                        it has no effect, as the host would have to wait for the answer
    draft_ngram         prompt lookup, for lossless rules: the longest run of last tokens, 2 to 16, that is looked up
                        earlier in the text. The guesses are the tokens after it. Used while it is faster; 0 is off
    prune               drop branches less likely than this share of the best one's probability; 0 keeps all
    ablate              for studies, all of them lossy: "rewrite" (keep the draft's K/V), "interleave" (no token of the
                        full model after a window that was accepted whole), "rollback" (keep every guess)
    """

    period: int | Literal["auto"] = AUTO
    accept: str = "lossless"
    threshold: float | None = None
    accept_temperature: float = 0.6
    tree_width: int = 1
    draft_confidence: float = 0.0
    draft_ngram: int = 0
    prune: float = 0.0
    ablate: tuple[Ablation, ...] = ()

    def __post_init__(self) -> None:
        if self.period != AUTO:
            _check_kinds(self, period=int)
        _check_kinds(self, accept=str, threshold=float | None, accept_temperature=float, tree_width=int, prune=float)
        _check_kinds(self, draft_confidence=float, draft_ngram=int)
        if self.period != AUTO and self.period < 1:
            raise ConfigError(f"period counts the tokens of a check, at least 1 (plain decoding); got {self.period}")
        if self.threshold is not None:
            if not 0 <= self.threshold <= 1:
                raise ConfigError(f"threshold is a probability, from 0 to 1; got {self.threshold}")
            if self.accept in OWN:
                raise ConfigError(
                    f"threshold {self.threshold} would change nothing: accept {self.accept!r} accepts only the full "
                    "model's own choice; leave threshold out, or set accept to 'threshold' (lossy)"
                )
        if not 0 < self.accept_temperature < float("inf"):
            raise ConfigError(f"accept_temperature must be a positive number; got {self.accept_temperature}")
        if self.tree_width < 1:
            raise ConfigError(f"tree_width counts branches, at least 1 (a chain); got {self.tree_width}")
        if (guesses := (self.longest - 1) * self.tree_width) > MOST_GUESSES:
            raise ConfigError(
                f"tree_width {self.tree_width} with a period of up to {self.longest} makes {guesses} guesses, and a "
                f"check reads at most {MOST_GUESSES} in its one pass; lower tree_width or period"
            )
        self._check_drafts()
        if not 0 <= self.prune <= 1:
            raise ConfigError(f"prune is a share of the best branch's probability, from 0 to 1; got {self.prune}")
        if not isinstance(self.ablate, tuple | list) or any(part not in get_args(Ablation) for part in self.ablate):
            raise ConfigError(f"ablate takes some of {', '.join(get_args(Ablation))}; got {self.ablate!r}")
        object.__setattr__(self, "ablate", tuple(self.ablate))

    def _check_drafts(self) -> None:
        confidence, ngram, given = self.draft_confidence, self.draft_ngram, self.draft_confidence or self.draft_ngram
        if not 0 <= confidence < 1:
            raise ConfigError(f"draft_confidence is a probability, from 0 (off) to below 1; got {confidence}")
        if ngram and not 2 <= ngram <= LONGEST_NGRAM:
            raise ConfigError(f"draft_ngram is a number of tokens, 2 to {LONGEST_NGRAM}, or 0 (off); got {ngram}")
        if confidence and self.tree_width > 1:
            raise ConfigError(
                f"draft_confidence {confidence} ends chains, and tree_width is {self.tree_width}; use prune for trees"
            )
        if given and self.period == 1:
            raise ConfigError("draft_confidence and draft_ngram would change nothing at period 1, which drafts nothing")
        if ngram and (self.accept not in OWN or self.ablate):
            raise ConfigError(
                "draft_ngram is used as long as it is faster, so a lossy text would depend on time; "
                "use a lossless accept and no ablate, or leave draft_ngram out"
            )

    @classmethod
    def paper(cls, **changes: Any) -> "CorrectionConfig":
        """Return the paper's setting, lossy: 16 tokens, guesses of probability 0.1 at temperature 0.6 are accepted.

        changes  fields to be set otherwise. Source: Sirius (arXiv 2409.03856), section 5.
        """
        fields = {"period": 16, "accept": "threshold", "accept_temperature": 0.6, **changes}
        if fields["accept"] not in OWN:
            fields.setdefault("threshold", THRESHOLD)
        return cls(**fields)

    @property
    def least(self) -> float:
        """The threshold that counts under a rule which has one."""
        return THRESHOLD if self.threshold is None else self.threshold

    @property
    def longest(self) -> int:
        """The most tokens that a branch of a check may have."""
        return LONGEST if self.period == AUTO else self.period

    def lossless(self, sampled: bool) -> bool:
        """Tell whether only the full model's own choice can pass, for a greedy text or for a sampled one.

        Above one half no other token than the argmax has the probability; a sample need not be the argmax.
        """
        if self.period == 1:
            return True
        own = self.accept in OWN or (self.accept == "threshold" and self.least > 0.5 and not sampled)
        return own and not self.ablate


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is taken from the scores; as they stand: the most likely one (greedy).

    temperature         0 is greedy
    top_p, top_k, min_p least likely tokens left out, as in transformers; 1, 0 and 0 leave out none
    repetition_penalty  None: what the checkpoint's generation config says
    seed                None: another text each time. With a seed the text is the same for every lossless rule,
                        sparsity, period, tree and batch, and the same as without a draft. It is a text's own: two
                        copies of a prompt with one seed are one text twice
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_kinds(self, temperature=float, top_p=float, top_k=int, min_p=float)
        _check_kinds(self, repetition_penalty=float | None, seed=int | None)
        if self.temperature != 0 and not (self.temperature >= COLDEST and isfinite(self.temperature)):
            raise ConfigError(f"temperature is 0 (greedy) or a number from {COLDEST} on; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is a probability, above 0 and at most 1 (off); got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k counts tokens, at least 1, or 0 (off); got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is a probability, from 0 (off) to 1; got {self.min_p}")
        penalty = self.repetition_penalty
        if penalty is not None and not (penalty > 0 and isfinite(penalty)):
            raise ConfigError(f"repetition_penalty is a positive number, 1 is off; got {penalty}")
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed is a whole number from 0 to {SEEDS - 1}; got {self.seed}")


def _check_kinds(config: object, **kinds: Any) -> None:
    """Raise ConfigError where a field is of another kind than it says; a whole number is also a float."""
    for name, kind in kinds.items():
        value = getattr(config, name)
        wide = kind | int if float in (kind, *get_args(kind)) else kind
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, wide):
            raise ConfigError(f"{name} must be {getattr(kind, '__name__', kind)}; got {value!r}")


DRAFT = SparsityConfig("none", draft_bits=AUTO)  # where nothing else is said: every neuron, its weights at fewer bits


def check_together(sampling: SamplingConfig, correction: CorrectionConfig | None) -> None:
    """Raise ConfigError where the rule of acceptance and the way of sampling contradict each other."""
    if sampling.temperature > 0 and correction is not None and correction.accept == "argmax":
        raise ConfigError(
            f"accept 'argmax' is for greedy text, and temperature is {sampling.temperature}; "
            "use accept 'lossless', or temperature 0 (do_sample=False)"
        )


@dataclass(frozen=True)
class Request:
    """One prompt to be decoded.

    prompt          token ids, at least one
    max_new_tokens  the budget of new tokens, at least 1
    stop            strings that end the text; the text leaves them out, the tokens hold what completed them
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _check_kinds(self, max_new_tokens=int)
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ConfigError(f"stop takes strings, none of them empty; got {list(self.stop)}")


@dataclass(frozen=True)
class Verdict:
    """What a check says of one row's tree.

    path    the kept guesses, oldest first, as nodes of the window (the newest token is 0)
    next    the token after them
    origin  where `next` comes from
    tip     the path on to the deepest guess that follows it, of those the one of highest score
    """

    path: tuple[int, ...]
    next: int
    origin: Origin
    tip: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """How many guesses come out."""
        return len(self.path) + (self.origin == "draft")


@dataclass(frozen=True)
class Round:
    """What one round did to one text, from the draft to the tokens that came out.

    tokens    what the round adds to the text: kept guesses, then one token of the full model unless a stop cut it off
    origins   where each token comes from: "full" (nothing was drafted), "draft", "bonus" (after a draft accepted to
              its full depth) or "correction" (before that: the guess there was rejected, or dropped from the tree)
    logprobs  the natural log of the full model's probability of each token, at temperature 1 before any processor
              (of the draft model's where it decodes alone)
    draft     the branch of the draft that went furthest; draft[accepted:] was rolled back
    guessed   the natural log of the full model's probability of each token of `draft`, after those before it; at
              temperature 1 before any processor
    accepted  how many guesses are in `tokens`
    steps     how many guesses deep the draft was
    period    K of this round
    cut       whether a stop ended the text inside this round
    scores    what the tokens were chosen by [len(tokens), V], where they were asked for: after processors
    logits    the same before processors
    looked_up whether the guesses were found in the text itself, which took no pass of the draft model
    """

    tokens: tuple[int, ...]
    origins: tuple[Origin, ...] = ()
    logprobs: tuple[float, ...] = ()
    draft: tuple[int, ...] = ()
    accepted: int = 0
    steps: int = 0
    period: int = 1
    cut: bool = False
    scores: Tensor | None = None
    logits: Tensor | None = None
    guessed: tuple[float, ...] = ()
    looked_up: bool = False

    @property
    def passes(self) -> int:
        """How many passes of the draft model were run."""
        return 0 if self.looked_up else self.steps

    def until(self, count: int) -> "Round":
        """Return the round as a stop after `count` of its tokens leaves it."""
        if count == len(self.tokens):
            return self
        return replace(
            self,
            tokens=self.tokens[:count],
            origins=self.origins[:count],
            logprobs=self.logprobs[:count],
            accepted=min(self.accepted, count),
            cut=True,
            scores=None if self.scores is None else self.scores[:count],
            logits=None if self.logits is None else self.logits[:count],
        )


@dataclass(frozen=True)
class Window:
    """Where the tokens of a pass stand after the tokens that their rows hold: the nodes of a tree of guesses.

    first   the node of the pass's first token; the others follow it
    depths  [B, T] int64     positions, counted from the first after the held ones
    seen    [B, T, M] bool   which of the nodes 0 .. M-1 each token looks at, its own among them
    weights [B, T] float     how likely each token's branch is, 0 of a dead one; each row's sum is 1, or 0
    fixed   the pass leaves the K/V of that many first nodes as they are
    apart   the tokens are no branches of one step: where sets of neurons are chosen per token, each has its own
    """

    first: int
    depths: Tensor
    seen: Tensor
    weights: Tensor
    fixed: int = 0
    apart: bool = False


class LanguageModel(Protocol):
    """What decoding needs of a model: rows of text that come and go, and passes over windows of guesses.

    Draft and full model are two modes of one model and share one KV cache. A row holds a prefix of its text. A pass
    writes the K/V of its tokens to the slots after that prefix, and `keep` makes some of them part of it.
    """

    @property
    def device(self) -> torch.device:
        """Where scores are, and windows are wanted."""
        ...

    def open(self, prompt: Tensor, slots: int) -> Tensor:
        """Add a row of `slots` slots that holds prompt [P] int64; return the scores of its next token [V]."""
        ...

    def read(self, tokens: Tensor, mode: Mode, window: Window) -> Tensor:
        """Feed tokens [B, T] int64, one line for each row, and return scores [B, T, V], until the next pass."""
        ...

    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Let each row hold the first counts[b] [B] of the nodes path[b] [B, n] int64 after what it holds already."""
        ...

    def rewind(self, count: int) -> None:
        """Let each row hold `count` tokens less, which are nodes 0 .. count - 1 then, for `keep` to take back."""
        ...

    def close(self, row: int) -> None:
        """Drop a row and free its slots; the last row takes its number."""
        ...
