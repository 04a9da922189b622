"""The words of a trace's page."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from sirius.core import OWN
from sirius.trace.collect import Faith, Trace, Writer

ORIGINS: dict[Writer, tuple[str, str]] = {
    "full": ("full model", "Written by the full model where nothing was drafted."),
    "draft": ("draft", "Guessed by the draft model, or looked up in the text, and accepted."),
    "bonus": ("bonus", "The full model's token after a draft that was accepted whole."),
    "correction": ("correction", "The full model's token where the next guess was rejected or dropped from the tree."),
    "sparse": ("draft model", "Written by the draft model alone, unchecked."),
}
FAITH: dict[Faith, tuple[str, str]] = {
    "lossless": ("Lossless.", "The text is, token for token, what the full model alone writes."),
    "rounding": (
        "Not certain to be lossless.",
        "The rule of acceptance is lossless, but rounding here differs with the number of tokens in a pass.",
    ),
    "lossy": ("LOSSY.", "The text need not be what the full model alone writes."),
}
ALSO = "or if it is the full model's own choice"


def rule(trace: Trace) -> str:
    """Return the rule of acceptance in words, with its threshold."""
    asked = trace.correction
    if asked is None:
        return "None: the draft model decoded alone."
    if asked["period"] == 1:
        return "None: nothing is drafted."
    left_out = f" Left out of the method: {', '.join(asked['ablate'])}." if asked["ablate"] else ""
    return _rule(asked) + left_out


def _rule(asked: dict[str, Any]) -> str:
    name, heat = asked["accept"], asked["accept_temperature"]
    least = 0.1 if asked["threshold"] is None else asked["threshold"]
    if name in OWN:
        return f"{name}: a guess passes only if it is the full model's own choice."
    if name == "threshold":
        return f"threshold: a guess passes if its probability at temperature {heat:g} is at least {least:g}, {ALSO}."
    if name == "relative":
        bound = f"{least:g} times the largest one"
    elif name == "typical":
        bound = f"the smaller of {least:g} and {sqrt(least):.3g} times exp(-entropy)"
    else:
        return f"{name}, with threshold {least:g} and temperature {heat:g}."
    return f"{name}: a guess passes if its probability at temperature {heat:g} is at least {bound}, {ALSO}."


def setting(trace: Trace) -> str:
    """Return what the text was decoded with, in one line."""
    sparse, sampled = trace.sparsity, trace.sampling
    parts = [
        f"{trace.parameters:,} parameters in {trace.dtype}",
        _draft(sparse),
        _correction(trace),
        "greedy" if sampled["temperature"] == 0 else f"sampled at temperature {sampled['temperature']:g}",
    ]
    off = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": None, "seed": None}
    parts += [f"{name} {sampled[name]:g}" for name, value in off.items() if sampled[name] != value]
    return ", ".join(parts)


def _draft(sparse: Mapping[str, Any]) -> str:
    kept = f"keep {sparse['keep']:g}" if sparse["threshold"] is None else f"threshold {sparse['threshold']:g}"
    neurons = "every neuron kept" if sparse["method"] == "none" else f"sparsity {sparse['method']} with {kept}"
    return neurons + (f", draft weights of {sparse['draft_bits']} bits" if sparse["draft_bits"] else "")


def _correction(trace: Trace) -> str:
    asked = trace.correction
    if asked is None:
        return "no correction"
    tree = f", {asked['tree_width']} branches side by side" if asked["tree_width"] > 1 else ""
    looked_up = f", looked up by up to {asked['draft_ngram']} tokens" if asked["draft_ngram"] else ""
    sure = f", confidence {asked['draft_confidence']:g}" if asked["draft_confidence"] else ""
    return "nothing drafted" if asked["period"] == 1 else f"period {asked['period']}{tree}{sure}{looked_up}"


def figures(trace: Trace) -> list[dict[str, str]]:
    """Return the figures of `Stats` that the page shows, by name and value."""
    stats = trace.stats
    period = "period auto" if stats["period"] == "auto" else f"of {stats['period']}"
    aal = "nothing drafted" if stats["aal"] is None else f"{stats['aal']:.2f} ({period})"
    rate = stats["acceptance_rate"]
    accepted = f"{rate:.1%} ({stats['accepted']} of {stats['drafted']})" if rate is not None else "nothing drafted"
    pairs = [
        ("Tokens per check (AAL)", aal),
        ("Guesses accepted", accepted),
        ("Guesses rolled back", str(stats["rolled_back"])),
        ("Share of the weights read per token (effective density)", f"{stats['effective_density']:.1%}"),
        ("Tokens per second", f"{stats['tokens_per_second']:.3g}"),
        ("Tokens", str(stats["tokens"])),
        ("Rounds after the prompt", str(stats["rounds"])),
    ]
    return [{"name": name, "value": value} for name, value in pairs]


def reads(trace: Trace) -> str:
    """Return which share of its neurons a draft token reads, "" where nothing was drafted."""
    if not trace.kept or (trace.correction is not None and not trace.stats["drafted"]):
        return ""
    low, high = min(trace.kept), max(trace.kept)
    share = f"{low:.1%}" if low == high else f"from {low:.1%} to {high:.1%}"
    gate = " The gate is read in full to choose them." if trace.gate == 1 and low < 1 else ""
    return f"{share} of the neurons in each of {len(trace.kept)} layers, over the whole text.{gate}"


def ending(trace: Trace) -> str:
    """Return why the text ends where it does."""
    if trace.finish_reason == "stop":
        return "The text ended by itself: with an end-of-text token or a stop string."
    return "The text ended because the budget of new tokens was used up."
