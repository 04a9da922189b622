"""Every figure that sirius reports, defined once.

Formulas: Sirius (arXiv 2409.03856), section 5; which parameters count is not said there, and was worked out from its
tables: embedding and output head both count, attention is dense, and the prefill is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sirius.core import AUTO, CorrectionConfig, Round

Convention = Literal["published", "streamed"]
SUMMED = "rounds rounds_complete drafted looked_up accepted corrections rolled_back tokens seconds".split()
PER_TOKEN = (
    "effective_density effective_density_streamed parameters_per_token bytes_per_token draft_bytes_per_token".split()
)


@dataclass(frozen=True)
class Parameters:
    """A model's parameters: their number, and the bytes of weights that a token reads.

    total      number of all parameters, each counted once (a tied embedding is the output head)
    weights    bytes of all weights
    embedding  bytes of the input embedding, where it is not tied: a token looks up one row, the rest is never read
    gate, up, down  bytes of the gated MLPs' three matrices, over all layers
    """

    total: int
    weights: int
    embedding: int
    gate: int
    up: int
    down: int

    def counted(self, convention: Convention) -> int:
        """Return the bytes that a dense token counts: all ("published"), or those it reads ("streamed")."""
        return self.weights if convention == "published" else self.weights - self.embedding


@dataclass(frozen=True)
class Touched:
    """The fractions of the rows of gate, up and down that one sparse token reads, each 0 to 1."""

    gate: float
    up: float
    down: float

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.gate, self.up, self.down)):
            raise ValueError(f"the shares of rows that a token reads are 0 to 1; got {self}")


DENSE = Touched(1.0, 1.0, 1.0)


def density(
    parameters: Parameters, touched: Touched, convention: Convention = "published", draft: Parameters | None = None
) -> float:
    """Return the share of the weights that a draft token touches, by bytes, 0 to 1.

    draft  the bytes of the weights that the draft reads; None: the model's own
    """
    own = draft or parameters
    skipped = (1 - touched.gate) * own.gate + (1 - touched.up) * own.up + (1 - touched.down) * own.down
    return (own.counted(convention) - skipped) / parameters.counted(convention)


def effective_density(period: int, density: float, aal: float) -> float:
    """Return the share of the parameters read per token when every window is whole: ((K-1) d + 1) / AAL."""
    return ((period - 1) * density + 1) / aal


@dataclass(frozen=True)
class Stats:
    """What a generation did.

    rounds               windows checked (without correction: sparse steps); the prompt's pass is not one
    rounds_complete      those drafted in full and not cut by a stop
    drafted, accepted    guesses of a branch that were checked, and those accepted into the text
    looked_up            those of `drafted` that were found in the text itself and took no pass of the draft model
    corrections          windows that did not pass to the full depth of their draft, each a rollback of the cache
    rolled_back          guesses that those windows threw away, of the branch that went furthest
    corrections_per_token  corrections / tokens
    tokens               new tokens, the prompt's first one included
    aal                  average advance length, tokens per window; None where nothing was drafted. With period "auto"
                         plain steps between windows do not count here, nor in the two that follow
    aal_complete         the same over complete windows; None where there is none
    period               K, or "auto"
    draft_bits           bits of the weights that drafts read; 0: the model's own, or nothing could be drafted
    density              share of the weights' bytes that a draft token touches ("published" convention)
    effective_density    share of the weights' bytes read per token: drafts at `density`, each check at 1
    density_streamed, effective_density_streamed   the same without the untied input embedding
    parameters_per_token effective_density times the number of parameters
    bytes_per_token      bytes of weights read per token, in drafts and checks together
    draft_bytes_per_token  those of the drafts alone
    acceptance_histogram entry i counts the windows that kept i guesses; a probe of period "auto" is in no figure but
                         seconds
    seconds              wall time of all passes that the text took part in, the prompt's included; what the caller does
                         between rounds is not. In a batch the rows' passes are the same ones
    tokens_per_second    tokens / seconds
    lossless             whether the text is by construction what the full model alone writes: its greedy text, or with
                         a temperature the sample that its seed gives. False where rounding may differ with the number
                         of tokens in a pass. That is so on a GPU. In 16 bits it is so on a CPU without the compiled
                         kernels, and for a model whose attention they do not take

    By the names that other programs give them (vLLM's): `acceptance_rate` and `mean_acceptance_length`.
    """

    rounds: int
    rounds_complete: int
    drafted: int
    looked_up: int
    accepted: int
    corrections: int
    rolled_back: int
    corrections_per_token: float
    tokens: int
    aal: float | None
    aal_complete: float | None
    period: int | Literal["auto"]
    draft_bits: int
    density: float
    effective_density: float
    density_streamed: float
    effective_density_streamed: float
    parameters_per_token: float
    bytes_per_token: float
    draft_bytes_per_token: float
    acceptance_histogram: tuple[int, ...]
    seconds: float
    tokens_per_second: float
    lossless: bool

    @property
    def acceptance_rate(self) -> float | None:
        """The share of the guesses accepted into the text, accepted / drafted, 0 to 1; None where there was none.

        In a tree a level of branches counts as one guess.
        """
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """The tokens that a window moves on, its token of the full model included: `aal` by another name."""
        return self.aal


@dataclass(frozen=True)
class Basis:
    """What the figures of a generation depend on besides its rounds.

    correction  None where the draft model decodes alone
    touched     what a sparse token read; DENSE where nothing is sparse
    kept        the share of its neurons that a sparse token kept in each layer, 0 to 1; none where nothing is sparse
    draft       the bytes of the weights that the draft reads; None: the model's own
    draft_bits  bits of each of those weights; 0: the model's own
    """

    parameters: Parameters
    touched: Touched
    correction: CorrectionConfig | None
    lossless: bool
    kept: tuple[float, ...] = ()
    draft: Parameters | None = None
    draft_bits: int = 0


def average_advance(rounds: Sequence[Round]) -> float | None:
    """Return the tokens per window (AAL: accepted + 1), or None of no windows."""
    return sum(len(r.tokens) for r in rounds) / len(rounds) if rounds else None


def summarise(rounds: Sequence[Round], basis: Basis, seconds: float) -> Stats:
    """Work out the figures of one generation; rounds[0] is the prompt's pass and counts as no window."""
    windows = rounds[1:]
    correction = basis.correction
    period = correction.period if correction else 1
    plain = period == AUTO or (correction is not None and correction.draft_ngram)  # steps stand between windows
    drafted = [w for w in windows if w.steps] if plain else windows
    complete = [w for w in drafted if not w.cut and w.steps == w.period - 1]
    tokens = sum(len(r.tokens) for r in rounds)
    accepted = [w.accepted for w in drafted]
    corrected = [w for w in windows if w.origins[-1:] == ("correction",)]
    published = density(basis.parameters, basis.touched, draft=basis.draft)
    streamed = density(basis.parameters, basis.touched, "streamed", basis.draft)
    effective = _read_per_token(windows, published, correction is not None)
    read = _read_per_token(windows, streamed, correction is not None)
    drafted_read = _drafted_per_token(windows, streamed, correction is not None)
    return Stats(
        rounds=len(windows),
        rounds_complete=len(complete),
        drafted=sum(w.steps for w in windows),
        looked_up=sum(w.steps - w.passes for w in windows),
        accepted=sum(accepted),
        corrections=len(corrected),
        rolled_back=sum(len(w.draft) - w.accepted for w in corrected),
        corrections_per_token=len(corrected) / tokens,
        tokens=tokens,
        aal=average_advance(drafted) if period != 1 else None,
        aal_complete=average_advance(complete) if period != 1 else None,
        period=period,
        draft_bits=basis.draft_bits,
        density=published,
        effective_density=effective,
        density_streamed=streamed,
        effective_density_streamed=read,
        parameters_per_token=effective * basis.parameters.total,
        bytes_per_token=read * basis.parameters.counted("streamed"),
        draft_bytes_per_token=drafted_read * basis.parameters.counted("streamed"),
        acceptance_histogram=tuple(accepted.count(i) for i in range(correction.longest if correction else 1)),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        lossless=basis.lossless,
    )


def _read_per_token(windows: Sequence[Round], density: float, corrected: bool) -> float:
    """Return the passes per token, each draft counted as `density` and each check as 1 (a sparse step: `density`).

    It equals `effective_density` where every window is whole.
    """
    check = 1.0 if corrected else density
    cost = sum(w.passes * density + check for w in windows)
    tokens = sum(len(w.tokens) for w in windows)
    return cost / tokens if tokens else check


def _drafted_per_token(windows: Sequence[Round], density: float, corrected: bool) -> float:
    """Return the draft passes per token, each counted as `density`; a draft model alone makes one more a window."""
    tokens = sum(len(w.tokens) for w in windows)
    return sum(w.passes + (not corrected) for w in windows) * density / tokens if tokens else 0.0


def combine(parts: Sequence[Stats]) -> Stats:
    """Return the figures of several generations of one setting taken together: sums, and means per window or token."""
    if not parts or len({(p.period, p.lossless) for p in parts}) > 1:
        raise ValueError("figures are combined over at least one generation, all of one setting")
    after_first = [p.tokens - 1 for p in parts]  # a prompt's first token belongs to no window
    sparse = [p.drafted - p.looked_up or p.rounds for p in parts]  # passes that the density is of
    sums = {name: sum(getattr(p, name) for p in parts) for name in SUMMED}
    means = {name: _mean([getattr(p, name) for p in parts], after_first) for name in PER_TOKEN}
    means |= {name: _mean([getattr(p, name) for p in parts], sparse) for name in ("density", "density_streamed")}
    return replace(
        parts[0],  # which also stands for the mean where nothing was decoded after the first token
        **sums,
        **{name: mean for name, mean in means.items() if mean},
        aal=_mean([p.aal for p in parts], [sum(p.acceptance_histogram) for p in parts]),
        aal_complete=_mean([p.aal_complete for p in parts], [p.rounds_complete for p in parts]),
        draft_bits=max(p.draft_bits for p in parts),  # parts of several machines may differ in it
        corrections_per_token=sums["corrections"] / sums["tokens"],
        acceptance_histogram=tuple(sum(bar) for bar in zip(*(p.acceptance_histogram for p in parts), strict=True)),
        tokens_per_second=sums["tokens"] / sums["seconds"] if sums["seconds"] > 0 else 0.0,
    )


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Return the weighted mean of the values that are there, None of no weight."""
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None and weight]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
