"""A trace as one page of HTML that needs no other file and no network."""

import json
from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import exp
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sirius.trace import words
from sirius.trace.collect import Guess, Trace, TracedRound, TracedToken

GENERATOR = "sirius trace"  # in the page's head, by which it is known
HEIGHT = 90  # of the tallest bar, in pixels
BROAD, NARROW, FEW = 12, 5, 80  # pixels of a bar, of one among more rounds than FEW
TITLE = 60  # characters of the text in the page's title
UNSAFE = str.maketrans({each: f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"})


def to_html(trace: Trace) -> str:
    """Return the page of a trace: the text's tokens by origin, the rounds, the figures.

    All that comes from the model or the user is escaped. The text of the tokens is the trace's, but for NUL, which HTML
    cannot have and which is shown as U+2400.
    """
    css, js = (
        Markup(files("sirius.trace").joinpath(f"page.{kind}").read_text("utf-8").strip()) for kind in ("css", "js")
    )
    template = files("sirius.trace").joinpath("page.html").read_text("utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    counts = {kind: sum(token.origin == kind for token in trace.tokens) for kind in words.ORIGINS}
    faith = words.FAITH[trace.faith]
    return page.render(
        trace=trace,
        generator=f"{GENERATOR} {trace.version}",
        title=f"Trace of {trace.model}: {' '.join(trace.text.split())[:TITLE]}",
        css=css,
        css_hash=_digest(css),
        js=js,
        js_hash=_digest(js),
        setting=words.setting(trace),
        faith={"name": faith[0], "meaning": faith[1]},
        figures=words.figures(trace),
        strip=_strip(trace),
        prompt=_shown(trace.prompt),
        legend=[
            {"kind": kind, "name": name, "meaning": meaning, "count": counts[kind]}
            for kind, (name, meaning) in words.ORIGINS.items()
            if counts[kind]
        ],
        tokens=[_token(each) for each in trace.tokens],
        ending=words.ending(trace),
        reads=words.reads(trace),
        layers=_layers(trace),
        judge="full" if trace.correction is not None else "draft",
        data=_data(trace),
    )


def _digest(content: str) -> str:
    """Return the hash by which a content security policy knows a style sheet or a script."""
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"


def _shown(text: str) -> Markup:
    """Return a text as HTML, with an empty element before each line break and tab that makes it visible."""
    safe = escape(text).replace("\0", "\u2400").replace("\r", "&#13;")  # a parser would make CR a line break
    return Markup(safe.replace("\n", "<i></i>\n").replace("\t", '<i class="tab"></i>\t'))


def _token(token: TracedToken) -> dict[str, Any]:
    marks = {"unused": token.unused} if token.unused else {}
    if not token.text and not token.unused:
        marks["mark"] = "\u2025" if token.part > 1 else token.name or f"#{token.id}"
    attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in marks.items())
    return {"kind": token.origin, "html": _shown(token.text), "marks": Markup(attributes)}


def _layers(trace: Trace) -> list[dict[str, str]]:
    """Return the layers' shares where they differ."""
    if len(set(trace.kept)) < 2:
        return []
    return [{"share": f"{share:.4f}", "percent": f"{share:.1%}"} for share in trace.kept]


def _strip(trace: Trace) -> dict[str, Any]:
    """Return the drawing of the rounds: one path for each kind of token, so that it stays small."""
    rounds, alone = trace.rounds, trace.correction is None
    step = BROAD if len(rounds) <= FEW else NARROW
    unit = HEIGHT / max(each.tokens + len(each.rolled_back) for each in rounds)
    paths: dict[str, list[str]] = {"draft": [], "own": [], "sparse": [], "back": []}
    for index, each in enumerate(rounds):
        own = "sparse" if alone and index else "own"
        top = 0
        parts = {"draft": each.accepted, own: each.tokens - each.accepted, "back": len(each.rolled_back)}
        for kind, count in parts.items():
            if count:
                height, y = count * unit, HEIGHT - (top + count) * unit
                paths[kind].append(f"M{index * step} {y:.3g}h{step - 1}v{height:.3g}h-{step - 1}z")
                top += count
    names = {
        "draft": "accepted guess",
        "own": "the full model's token",
        "sparse": "the draft model's token",
        "back": "guess rolled back",
    }
    stats = trace.stats
    return {
        "width": len(rounds) * step,
        "height": HEIGHT,
        "step": step,
        "label": f"{len(rounds)} rounds: {stats['accepted']} guesses accepted, {stats['rolled_back']} rolled back",
        "legend": [{"kind": kind, "name": names[kind]} for kind, path in paths.items() if path],
        "bars": [{"kind": kind, "path": "".join(path)} for kind, path in paths.items() if path],
    }


def _data(trace: Trace) -> Markup:
    """Return what the page's script reads, as JSON that no element of HTML can end."""
    found = {
        "tokens": [_token_row(each) for each in trace.tokens],
        "rounds": [_round_row(each) for each in trace.rounds],
        "origins": words.ORIGINS,
        "rule": words.rule(trace),
    }
    return Markup(json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(UNSAFE))


def _token_row(token: TracedToken) -> list[Any]:
    row = [token.id, token.name, _probability(token.logprob), token.round]
    return [*row, token.part, token.parts] if token.parts > 1 else row


def _round_row(each: TracedRound) -> list[Any]:
    back = [_guess_row(guess) for guess in each.rolled_back]
    return [each.tokens, each.accepted, each.period, each.steps, int(each.cut), back]


def _guess_row(guess: Guess) -> list[Any]:
    return [guess.id, guess.text or guess.name, _probability(guess.logprob)]


def _probability(logprob: float | None) -> float:
    return 0.0 if logprob is None else float(f"{exp(logprob):.4g}")
