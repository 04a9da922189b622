"""Questions of public tests, as prompts for real models."""

import gzip
import json
from pathlib import Path

from sirius import Engine
from sirius.engine import Prompt
from sirius.errors import FileError

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = {"gsm8k": "gsm8k_test.jsonl.gz", "truthfulqa": "truthfulqa.jsonl.gz"}


def questions(task: str, count: int, data: Path = DATA) -> list[str]:
    """Return the first questions of a task; raise FileError where its file is missing, broken or too short."""
    path = data / FILES[task]
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found = [json.loads(line)["question"] for line, _ in zip(lines, range(count), strict=False)]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise FileError(f"cannot read questions from {path}: {error!r}; name a folder that holds it") from error
    if len(found) < count:
        raise FileError(f"{path} holds {len(found)} questions; {count} were asked for")
    return found


def as_prompt(engine: Engine, question: str) -> Prompt:
    """Return a question as the model takes one: a message where it has a chat template, a text to go on from if not."""
    if engine.tokenizer is not None and engine.tokenizer.chat_template:
        return [{"role": "user", "content": question}]
    return f"Question: {question}\nAnswer:"
