"""The tasks of the paper by their names: the data, the metric that tables show, and the paper's setting of each.

Source: Sirius (arXiv 2409.03856), section 5 and its tables; the settings are those of Llama-3-8B-Instruct.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sirius.core import OWN, PAPER
from sirius.decoding import check_rule
from sirius.settings import NONE, Setting, make_setting
from sirius.sparsity import canonical, check_options

Kind = Literal["understanding", "reasoning"]


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper, or of the embedded model.

    kind     understanding a text, where sparsity does well, or reasoning, where it fails
    metric   the metric that tables show, by lm-eval's name: metric,filter
    chance   what guessing scores, 0 where answers are free
    files    local files by split, without their endings; the first split is the one that is tested
    keep     the fraction of neurons kept, from 0 to 1
    threshold  the least probability of an accepted token
    widths   the tree's width of each sparsity method
    stock    lm-eval's own task of that name, where it is one
    shown    the split of its worked examples, where they are in a file
    chat     whether it is a conversation, which needs the chat template
    """

    kind: Kind
    metric: str
    files: Mapping[str, str]
    chance: float = 0.0
    keep: float = 0.5
    threshold: float = 0.1
    widths: Mapping[str, int] = field(default_factory=lambda: {"coarse": 8, "fine": 4})
    stock: bool = False
    shown: str | None = None
    chat: bool = False

    @property
    def needed(self) -> set[str]:
        """The splits that the task cannot do without."""
        return {*list(self.files)[:1], *([self.shown] if self.shown else [])}

    def preset(self, sparsity: str) -> dict[str, Any]:
        """Return the paper's setting of the task for a sparsity method, as the options of `make_setting`."""
        return {
            "sparsity": sparsity,
            "keep": self.keep,
            "preset": PAPER,
            "period": 16,
            "threshold": self.threshold,
            "tree_width": self.widths.get(sparsity, 1),
        }


GSM8K = {"test": "gsm8k_test", "train": "gsm8k_train"}
EXEMPLARS = "cot_prompts"  # a local file of worked examples, for the tasks that have them

TASKS: dict[str, PaperTask] = {
    "gsm8k": PaperTask("reasoning", "exact_match,strict-match", GSM8K, stock=True, shown="train"),
    "gsm8k_cot": PaperTask("reasoning", "exact_match,flexible-extract", GSM8K, threshold=0.05, stock=True),
    "aqua_rat_cot": PaperTask(
        "reasoning", "exact_match,none", {"test": "aqua_test", "validation": "aqua_dev"}, chance=0.2
    ),
    "csqa_cot": PaperTask(
        "reasoning", "exact_match,none", {"validation": "csqa_dev"}, chance=0.2, keep=0.4, threshold=0.05
    ),
    "strategyqa_cot": PaperTask(
        "reasoning", "exact_match,none", {"test": "strategyqa"}, chance=0.5, keep=0.4, threshold=0.05
    ),
    "date_cot": PaperTask("reasoning", "exact_match,none", {"test": "date_understanding"}, keep=0.4, threshold=0.05),
    "sports_cot": PaperTask(
        "reasoning", "exact_match,none", {"test": "sports_understanding"}, chance=0.5, keep=0.4, threshold=0.05
    ),
    "humaneval": PaperTask(
        "reasoning", "pass@1,create_test", {"test": "humaneval"}, threshold=0.05, widths={"coarse": 8, "fine": 6}
    ),
    "mbpp_plus": PaperTask(
        "reasoning", "pass_at_1,none", {"test": "mbppplus"}, threshold=0.05, widths={"coarse": 8, "fine": 6}
    ),
    "mmlu_flan_cot_fewshot": PaperTask(
        "reasoning", "exact_match,get-answer", {"test": "mmlu_test", "validation": "mmlu_dev"}, chance=0.25, stock=True
    ),
    "cnn_dailymail": PaperTask("understanding", "rougeL,none", {"test": "cnn_dailymail"}),
    "coqa": PaperTask("understanding", "f1,none", {"validation": "coqa"}),
    "truthfulqa_gen": PaperTask(
        "understanding", "rouge1_acc,none", {"validation": "truthfulqa"}, chance=0.5, stock=True
    ),
    "demo_reasoning": PaperTask("reasoning", "exact_match,none", {}, keep=0.4, chat=True),
    "demo_understanding": PaperTask("understanding", "exact_match,none", {}, keep=0.4, chat=True),
}
SUBJECTS = "mmlu_flan_cot_fewshot"  # a group of 57 tasks, one for each subject


def task_of(name: str) -> PaperTask | None:
    """Return the paper's task of a name, or of a subject of MMLU; None where it is another one."""
    return TASKS.get(SUBJECTS if name.startswith(SUBJECTS) else name)


def needs_chat(name: str) -> bool:
    """Tell whether a task is a conversation, which needs the chat template."""
    known = task_of(name)
    return known is not None and known.chat


def setting_for(name: str, values: Mapping[str, Any]) -> Setting:
    """Return the setting of a task; preset "paper" is the paper's own of that task, and what stands beside it wins.

    With correct: false that preset says which share of the neurons is kept.

    A method's second name counts as its first. Raises ConfigError as `make_setting` does, and of a method or rule that
    is none, or that refuses its options.
    """
    known = task_of(name)
    if isinstance(values.get("sparsity"), str):
        values = {**values, "sparsity": canonical(values["sparsity"])}
    if values.get("preset") == PAPER and not values.get("draft_bits"):
        values = {"sparsity": "coarse", **values}
    if values.get("preset") == PAPER and values.get("sparsity", NONE) != NONE:
        own = {} if known is None else known.preset(str(values.get("sparsity", "coarse")))
        if values.get("accept") in OWN:
            own.pop("threshold", None)
        if not values.get("correct", True):  # the same neurons, alone
            own = {key: own[key] for key in own if key == "keep"}
            values = {key: values[key] for key in values if key != "preset"}
        values = {**own, **values}
    setting = make_setting(values)
    check_options(setting.sparsity)
    if setting.correction is not None:
        check_rule(setting.correction.accept)
    return setting
