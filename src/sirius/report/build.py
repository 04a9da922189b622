"""A report of the results of sweeps."""

from collections.abc import Sequence
from pathlib import Path

from sirius.report import labels, sweeps, tables, windows
from sirius.report.cells import load_cells
from sirius.report.compare import ModelCells, by_model
from sirius.report.document import Chapter, Facts, Part, Report

TITLE = "Results of Sirius sweeps"
LEAD = (
    "A number after ± is a standard error: the standard deviation of the items' scores, divided by the square root of "
    "their number. Error bars and bands in plots show one standard error on each side. It is 0 where all items have "
    "the same score, which does not make the value certain.",
    "Differences to full are paired: the mean over the items of the score minus the full model's on the same item, "
    "with the standard error of these differences. Scores are of tested items only; items on which settings were "
    "chosen are not among them.",
)
MEANINGS = (
    ("full", "The model with all of its neurons, without sparsity."),
    ("coarse, fine", "Sparsity methods. coarse keeps one set of neurons for each prompt, fine one for each token. "
     "The number is the fraction of neurons that is kept."),
    ("every neuron, 4 bits", "The draft keeps every neuron and reads the weights at 4 bits. Bits auto are 8 in a small "
     "model and 4 in others."),
    ("alone", "The draft model decodes without correction."),
    ("K, w", "The period (tokens of the full model's check, of which K - 1 are guesses) and the width of the tree."),
    ("AAL", "Average advance length: tokens that a window adds to the text, the full model's own token included. Its "
     "standard error is the one of the number of accepted guesses, with windows taken as independent."),
    ("acceptance rate", "The share of all guesses that stand in the text."),
    ("density", "The share of the parameters that one sparse token reads, embedding and output head counted."),
    ("effective density", "The share of the parameters read per token of text, drafts and checks together, counted "
     "while decoding. By formula: ((K-1) d + 1) / AAL with the density d, which takes every window as whole."),
    ("bytes per token", "Bytes of weights read per token. An input embedding of its own, apart from the output head, "
     "does not count."),
    ("lossless, lossy", "Lossless: the rule lets only the full model's own tokens pass, so the text is the full "
     "model's. Up to rounding: passes of several tokens may round otherwise than those of one. Lossy: the text may be "
     "another one."),
    ("threshold above 0.5", "No other token than the full model's own choice can have such a probability, so a greedy "
     "text is lossless."),
    ("chosen", "The best one of several settings on validation items, which are not tested."),
    ("chance level", "What guessing scores on average."),
    ("a dash", "There is no result for this entry, or the figure does not exist for this setting."),
)  # fmt: skip


def build(folders: Sequence[Path]) -> Report:
    """Return the report of the sweeps of some folders; raises as `load_cells` does."""
    models = by_model(load_cells(folders))
    names = [labels.model_name(each.model) for each in models]
    chapters = [
        Chapter(name if names.count(name) == 1 else _told_apart(name, each), _parts(each))
        for name, each in zip(names, models, strict=True)
    ]
    return Report(TITLE, LEAD, [*chapters, Chapter("What the words mean", [_meanings()])])


def _told_apart(name: str, cells: ModelCells) -> str:
    model = cells.model
    parts = [labels.dtype_name(model), *([f"revision {model['revision']}"] if model.get("revision") else [])]
    return f"{name} ({', '.join(parts)})"


def _parts(cells: ModelCells) -> list[Part]:
    parts = [
        tables.what_was_run(cells),
        tables.understanding_against_reasoning(cells),
        tables.with_correction(cells),
        *sweeps.ablations(cells),
        sweeps.components(cells),
        sweeps.oracle(cells),
        windows.windows(cells),
    ]
    return [part for part in parts if part is not None]


def _meanings() -> Part:
    return Part("Terms", [Facts([(name, [text]) for name, text in MEANINGS])])
