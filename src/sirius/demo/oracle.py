"""The oracle study: how few tokens of the sparse model must be replaced to bring the full model's reasoning back.

Both models go side by side, token by token: the sparse one proposes, and where the full one finds that token less
likely than a threshold, its own argmax stands instead. That is correction with windows of one guess and no interleaved
token, and the K/V are the full model's. Source: Sirius (arXiv 2409.03856), section 3, without details of its oracle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from sirius.core import CorrectionConfig, SparsityConfig
from sirius.demo.problems import few_shot, final_answer
from sirius.demo.showcase import NEW_TOKENS
from sirius.engine import Engine
from sirius.stats import combine
from sirius.texts import Completion

THRESHOLDS = (0.0, 1e-6, 1e-4, 0.01, 0.1, 0.5)


@dataclass(frozen=True)
class Point:
    """Accuracy at one threshold, 0 to 1 with its standard error, and the share of the tokens that were replaced."""

    threshold: float
    problems: int
    accuracy: float
    stderr: float
    replaced: float


def run(
    engine: Engine,
    sparsity: SparsityConfig,
    problems: int,
    seed: int,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    on_problem: Callable[[], None] = lambda: None,
) -> list[Point]:
    """Decode `problems` reasoning problems at every threshold; `on_problem` is called after each one."""
    asked = [few_shot("reasoning", "test", seed, index) for index in range(problems)]
    messages = [message for message, _ in asked]
    budget = min(NEW_TOKENS, *(engine.room(message) for message in messages))
    points = []
    for threshold in thresholds:
        rule = CorrectionConfig(2, "threshold", threshold, accept_temperature=1.0, ablate=("interleave",))
        right, stats = 0, []
        options = {"max_new_tokens": budget, "sparsity": sparsity, "correction": rule}
        for index, done in engine.generate_many(messages, **options):
            assert isinstance(done, Completion)
            right += final_answer(done.text) == asked[index][1].final
            stats.append(done.stats)
            on_problem()
        share = right / problems
        points.append(
            Point(
                threshold, problems, share, sqrt(share * (1 - share) / problems), combine(stats).corrections_per_token
            )
        )
    return points
