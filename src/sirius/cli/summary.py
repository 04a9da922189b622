"""One line about a text: how fast it came, what drafting did for it, and whose text it is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sirius.cli.terminal import err, remark

if TYPE_CHECKING:
    from sirius.core import CorrectionConfig
    from sirius.engine import Completion
    from sirius.stats import Stats


def tell(done: "Completion", options: Mapping[str, Any]) -> None:
    """Say on the error stream what a completion's figures say; `options` are those that it was decoded with."""
    between = " - " if err.options.ascii_only else " \N{MIDDLE DOT} "
    remark(between.join([_speed(done.stats), _drafting(done.stats, options), _faith(done.stats, options)]))


def _speed(stats: "Stats") -> str:
    speed = stats.tokens_per_second
    return f"{speed:.0f} tok/s" if speed >= 10 else f"{speed:.1f} tok/s"


def _drafting(stats: "Stats", options: Mapping[str, Any]) -> str:
    if options["correction"] is None and not stats.lossless:
        return "draft model alone"
    guesses = options["sparsity"].draft_bits or (options["correction"] and options["correction"].draft_ngram)
    if stats.period == 1 or (options["sparsity"].method == "none" and not guesses):
        return "nothing drafted"
    if not stats.drafted:
        return "nothing drafted: " + _why_undrafted(stats, options)
    windows = sum(stats.acceptance_histogram)
    kept, guessed = (f"{count / windows:.1f}".removesuffix(".0") for count in (stats.accepted, stats.drafted))
    share = stats.effective_density_streamed
    paid = "" if share < 1 else ", so it saved nothing"
    return f"drafted: {kept} of {guessed} guesses accepted, {share:.0%} of the weights read per token{paid}"


def _why_undrafted(stats: "Stats", options: Mapping[str, Any]) -> str:
    if options["sparsity"].method == "none" and not options["sparsity"].draft_bits:
        return "the last tokens stood nowhere before"
    return "it did not promise to be faster" if stats.period == "auto" else "a short text"


def _faith(stats: "Stats", options: Mapping[str, Any]) -> str:
    correction = options["correction"]
    if stats.lossless:
        return "text of the full model"
    if correction is not None and correction.lossless(options["sampling"].temperature > 0):
        return (
            "not certain to be the full model's text, as rounding here differs with the number of tokens in a pass; "
            "--period 1 of a single prompt is certain, and so is --device cpu --dtype float32"
        )
    return f"LOSSY: need not be the full model's text ({_why(correction)}); the defaults give that"


def _why(correction: "CorrectionConfig | None") -> str:
    if correction is None:
        return "--no-correct"
    if correction.ablate:
        return f"--ablate {' '.join(correction.ablate)}"
    return f"{correction.accept} {correction.least:g}"
