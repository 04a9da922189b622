"""The plan that a correction asks for."""

from dataclasses import replace

from sirius.core import CorrectionConfig, Mode
from sirius.decoding.accept import Rule, make_rule
from sirius.decoding.lookup import Lookup
from sirius.decoding.loop import Plan
from sirius.decoding.period import Period
from sirius.decoding.studies import WITHOUT
from sirius.errors import ConfigError


def make_plan(
    correction: CorrectionConfig | None,
    period: Period,
    ends: frozenset[int],
    rule: Rule | None = None,
    lookup: Lookup | None = None,
) -> Plan:
    """Return how texts are decoded under a correction, None being the draft model alone.

    period  at most as long as the correction allows, so that the cache has room for its drafts
    rule    in place of the one that the correction names
    lookup  what earlier texts left of prompt lookup; None: nothing is looked up

    Raises ConfigError of a longer period, of a name that no rule has, and of a rule where nothing is corrected.
    """
    if not isinstance(period, Period):
        raise ConfigError(f"period is a sirius.decoding.period.Period; got {period!r}: set others in the correction")
    if rule is not None and not callable(rule):
        raise ConfigError(f"rule is a function of a Check, see docs/adding-a-method.md; got {rule!r}")
    longest = 1 if correction is None else correction.longest
    if period.now > longest:
        raise ConfigError(f"period begins at {period.now} tokens a check, and the correction allows at most {longest}")
    if correction is None:
        if rule is not None:
            raise ConfigError("rule accepts guesses, and without a correction there are none; leave rule out")
        return Plan(period, verifier=Mode.SPARSE, ends=ends)
    plan = Plan(
        period,
        make_rule(correction),
        ends=ends,
        width=correction.tree_width,
        prune=correction.prune,
        temperature=correction.accept_temperature,
        confidence=correction.draft_confidence,
        lookup=lookup,
    )
    for part in correction.ablate:
        plan = WITHOUT[part](plan)
    return plan if rule is None else replace(plan, rule=rule)


def refuse_own(rule: Rule | None, period: Period | None) -> None:
    """Raise ConfigError of a rule or period of the caller's own, for a batch in which no model drafts."""
    if given := [name for name, own in (("rule", rule), ("period", period)) if own is not None]:
        raise ConfigError(
            f"{' and '.join(given)} would change nothing with sparsity 'none' and draft_bits 0, where no model drafts; "
            "name a sparsity method, or set draft_bits to 'auto'"
        )
