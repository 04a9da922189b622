"""What the README claims of the embedded model, on problems of another seed."""

import pytest

from sirius.demo import showcase
from sirius.demo.embedded import FOLDER
from sirius.engine import Engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def accuracy() -> dict[tuple[str, str], float]:
    rows = showcase.run(Engine.load(str(FOLDER)), showcase.make_settings(), problems=50, seed=99)
    return {(row.task, row.setting): row.accuracy for row in rows}


def test_the_full_model_reasons(accuracy):
    assert accuracy["reasoning", "full"] >= 0.9


@pytest.mark.parametrize("method", ["coarse", "fine"])
def test_sparsity_ruins_reasoning_and_correction_wins_it_back(accuracy, method):
    full, alone = accuracy["reasoning", "full"], accuracy["reasoning", method]
    corrected = accuracy["reasoning", f"{method} + correction"]
    assert full - alone >= 0.25
    assert corrected - alone >= 0.8 * (full - alone)


def test_coarse_sparsity_leaves_understanding_alone(accuracy):
    assert accuracy["understanding", "coarse"] >= accuracy["understanding", "full"] - 0.1
