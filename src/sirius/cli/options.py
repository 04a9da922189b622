"""What the options of `sirius generate` ask for together; those that would change nothing are refused by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sirius.errors import ConfigError

if TYPE_CHECKING:
    import typer

    from sirius.sparsity.base import Factory

DRAFTING = ("draft_confidence", "draft_ngram")
CORRECTING = (
    *("period", "accept", "threshold", "accept_temperature", "tree_width", "prune", "ablate"),
    *DRAFTING,
)
SPARSE = ("keep", "sparsity_threshold", "per_branch", "shared_set", "refresh")
HOT = ("top_p", "top_k", "min_p", "seed")  # `sirius.jobs` has them too, and is slow to import
LOSSLESS = ("lossless", "argmax", "sampling")  # `sirius.core` has them too, likewise
AUTO = "auto"  # likewise
PRESETS = ("paper",)
UNDRAFTED = "at --period 1, which drafts nothing; give a longer period"
GUESSLESS = "with --sparsity none and no bits, where nothing is drafted; give --draft-bits 4, or name a method"


@dataclass(frozen=True)
class CommandLine:
    """The command line of `sirius generate`, or of a command that shares options with it.

    values  of all options, by their names in Python
    given   the names of those that stand on the command line
    """

    values: Mapping[str, Any]
    given: frozenset[str]

    @classmethod
    def of(cls, context: "typer.Context", **others: Any) -> "CommandLine":
        """Return a context's command line; `others` are options that its command does not have, by their values."""
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = frozenset(name for name, at in sources.items() if at and at.name == "COMMANDLINE")
        return cls({**others, **context.params}, given)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def plain(self) -> bool:
        """Whether nothing is drafted."""
        return self["period"].strip().lstrip("0") == "1"

    @property
    def method(self) -> str:
        """The name of the sparsity method; beside the paper's preset it is the paper's coarse unless one is given."""
        own = self["preset"] is not None and not self.bits
        return self["sparsity"] or ("coarse" if own else "none")

    @property
    def draftless(self) -> bool:
        """Whether there is no draft model, so that guesses can only be looked up."""
        bits = self["sparsity"] is None if self.bits is None else self.bits
        return self.method == "none" and not bits

    @property
    def guessless(self) -> bool:
        """Whether there is neither a draft model nor a lookup."""
        return self.draftless and not self["draft_ngram"]

    @property
    def bits(self) -> int | str | None:
        """Bits of the draft's weights; None where they were not given."""
        return None if self["draft_bits"] is None else _number_or_auto("draft_bits", self["draft_bits"])

    @property
    def own_rule(self) -> bool:
        """Whether only the full model's own choice is accepted."""
        return self["accept"] in LOSSLESS and (self["preset"] is None or "accept" in self.given)

    @property
    def local(self) -> bool:
        """Whether the model lies in a folder or file."""
        model = self["model"]
        return model is not None and Path(model).expanduser().exists()


@dataclass(frozen=True)
class Idle:
    """Options that change nothing where something holds.

    why  the end of "--x would change nothing ...", with a way out
    """

    where: Callable[[CommandLine], bool]
    names: tuple[str, ...]
    why: str


IDLE = (
    Idle(lambda a: not a["correct"], ("preset", *CORRECTING, "refresh"), "without correction; leave out --no-correct"),
    Idle(
        lambda a: a.method == "none",
        SPARSE,
        "without a sparsity method, where every neuron is kept; name one, as --sparsity coarse",
    ),
    Idle(
        lambda a: a.draftless,
        ("preset", "tree_width", "prune", "ablate", "draft_confidence"),
        "with --sparsity none and --draft-bits 0, where no model drafts; name a method, or give --draft-bits 4",
    ),
    Idle(lambda a: a.guessless and not a.plain, ("period", "threshold", "accept_temperature"), GUESSLESS),
    Idle(lambda a: a.guessless and not a.plain and not a.own_rule, ("accept",), GUESSLESS),
    Idle(
        lambda a: a.plain,
        ("preset", "threshold", "accept_temperature", "tree_width", "prune", "ablate", "refresh", *DRAFTING),
        UNDRAFTED,
    ),
    Idle(lambda a: a.plain and not a.own_rule, ("accept",), UNDRAFTED),
    Idle(lambda a: a["tree_width"] == 1, ("prune", "per_branch"), "in a chain, which is one branch; give --tree-width"),
    Idle(
        lambda a: a["tree_width"] == 1 and a.own_rule,
        ("accept_temperature",),
        "in a chain under a lossless rule; give --tree-width, or a lossy --accept",
    ),
    Idle(lambda a: a["input"] is None, ("shared_set", "batch_size"), "with one prompt; give --input"),
    Idle(
        lambda a: a["input"] is None and a["temperature"] == 0,  # a file's lines may have temperatures
        HOT,
        "at temperature 0, which is greedy; give --temperature",
    ),
    Idle(
        lambda a: not a["json"] and a["output"] is None,
        ("logprobs",),
        "in plain text; give --json, or --output with --input",
    ),
    Idle(lambda a: a["output"] is None, ("force",), "without a file to write over; give --output"),
    Idle(lambda a: a["model"] is None, ("revision", "trust_remote_code"), "with the embedded model; give --model"),
    Idle(lambda a: a.local, ("revision",), "with a model that is on this machine; it is of a hub id"),
)


def check_effect(command: CommandLine) -> None:
    """Raise ConfigError of options that were given and would change nothing, and of words that are none."""
    if command["preset"] is not None and command["preset"] not in PRESETS:
        raise ConfigError(f"--preset is {', '.join(PRESETS)}; got {command['preset']!r}")
    for idle in IDLE:
        if (found := _flags(command, idle.names)) and idle.where(command):
            raise ConfigError(f"{found} would change nothing {idle.why}")


def setting_of(command: CommandLine) -> dict[str, Any]:
    """Return the options of sparsity and correction that were given, as `sirius.settings.make_setting` takes them.

    Raises ConfigError of a method or rule that is none, and of options that the method has no use for.
    """
    from sirius.decoding import check_rule
    from sirius.settings import NAMES
    from sirius.sparsity import find

    check_method(command, find(command.method))
    check_rule(command["accept"])
    found = {name: command[name] for name in NAMES if name in command.given}
    return found | {name: _number_or_auto(name, found[name]) for name in ("period", "draft_bits") if name in found}


def check_method(command: CommandLine, factory: "Factory | None") -> None:
    """Raise ConfigError of options that a sparsity method has no use for; what a plug-in makes of them is its own."""
    from sirius.sparsity import PromptSparsity, TokenSparsity, fine

    name, kind = command.method, factory if isinstance(factory, type) else object
    if issubclass(kind, TokenSparsity) and (found := _flags(command, ("refresh", "shared_set"))):
        raise ConfigError(
            f"{found} would change nothing with --sparsity {name}, which has a set for each token; use coarse"
        )
    if issubclass(kind, PromptSparsity) and (found := _flags(command, ("per_branch", "sparsity_threshold"))):
        raise ConfigError(
            f"{found} would change nothing with --sparsity {name}, which keeps a fixed fraction for a whole prompt; "
            "use fine"
        )
    if issubclass(kind, fine.FineSparsity) and {"keep", "sparsity_threshold"} <= command.given:
        raise ConfigError("--keep would change nothing beside --sparsity-threshold; give one of them")


def check_hot(command: CommandLine, any_hot: bool) -> None:
    """Raise ConfigError of sampling options beside a file of which no line has a temperature."""
    if not any_hot and command["temperature"] == 0 and (found := _flags(command, HOT)):
        raise ConfigError(
            f"{found} would change nothing, as neither the command nor a line has a temperature; give --temperature"
        )


def make_options(command: CommandLine) -> dict[str, Any]:
    """Return the options of `Engine.generate`; raise ConfigError where they are out of range or contradict."""
    from sirius.core import Request, SamplingConfig, check_together
    from sirius.settings import make_correction, make_sparsity

    setting = setting_of(command)  # what is wrong is told before a large model is loaded
    stop, budget = tuple(command["stop"]) if command["stop"] else None, command["max_new_tokens"]
    Request((0,), 1 if budget is None else budget, stop or ())
    correction = make_correction(setting) if command["correct"] else None
    sampling = SamplingConfig(
        **{name: command[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")}
    )
    check_together(sampling, correction)
    return {
        "max_new_tokens": budget,
        "stop": stop,
        "sparsity": make_sparsity(setting),
        "correction": correction,
        "sampling": sampling,
    }


def _number_or_auto(name: str, text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')} is a whole number or auto; got {text!r}") from error


def _flags(command: CommandLine, names: tuple[str, ...]) -> str:
    """Return those of some options that were given, as they are written."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if name in command.given)
