"""The paper's tasks as lm-eval loads them: files of this package, and lm-eval's own, with local data if wanted."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager

from sirius.errors import ConfigError, SiriusError
from sirius.evaluation.catalogue import SUBJECTS, TASKS
from sirius.evaluation.data import check_files

OWN = Path(__file__).parent / "tasks"
STOCK = Path(lm_eval.tasks.__file__).parent
STOCK_FILES = {  # where lm-eval keeps its own
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "truthfulqa_gen": "truthfulqa/truthfulqa_gen.yaml",
}
STOCK_FOLDERS = [*dict.fromkeys(Path(each).parent for each in STOCK_FILES.values()), Path("mmlu", "flan_cot_fewshot")]
LOCAL = """include: {include}
task: {task}
custom_dataset: !function sirius.evaluation.data.load
dataset_kwargs:
  sirius_task: {task}
  sirius_folder: {folder}
"""


logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)  # it warns of each task of ours in place of its own


@contextmanager
def suite_folder(data: Path | None) -> Iterator[Path]:
    """Give a folder of task files for lm-eval's --include_path, which stays until the block ends.

    data  where local files of the sets are; None takes the hub's
    """
    if data is None:
        yield OWN
        return
    with TemporaryDirectory(prefix="sirius-tasks-") as made:
        for name, include in _includes():
            folder = json.dumps(str(data.resolve()) if TASKS.get(name, TASKS[SUBJECTS]).files else None)
            text = LOCAL.format(include=json.dumps(str(include)), task=name, folder=folder)
            (Path(made) / f"{name}.yaml").write_text(text)
        yield Path(made)


def _includes() -> Iterator[tuple[str, Path]]:
    """Yield the paper's tasks, each with the file that its local variant builds on."""
    for name, task in TASKS.items():
        if name == SUBJECTS:
            for path in sorted((STOCK / STOCK_FOLDERS[-1]).glob("mmlu_*.yaml")):
                yield path.stem.replace("mmlu_", f"{SUBJECTS}_", 1), path
        else:
            yield name, STOCK / STOCK_FILES[name] if task.stock else OWN / f"{name}.yaml"


def check_tasks(names: Sequence[str], data: Path | None, manager: TaskManager) -> None:
    """Raise ConfigError of a name that is no task, FileError of one whose local file is missing."""
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data is a folder of local files; {data} is none")
    known = manager.all_tasks
    for name in names:
        if not manager.match_tasks([name]):
            near = get_close_matches(name, known, 3)
            hint = f"; close names are {', '.join(near)}" if near else ""
            raise ConfigError(f"there is no task {name!r}{hint}; the paper's are {', '.join(TASKS)}")
        if data is not None:
            check_files(name, data)


def task_manager(folder: Path, names: Sequence[str] = (), metadata: Any = None) -> TaskManager:
    """Return lm-eval's tasks with those of a folder in place of its own of the same name.

    names     where the paper's tasks have all of them, lm-eval's thousands of files are not read, which takes 10 s
    metadata  what lm-eval's option --metadata gives to tasks
    """
    paths: list[str | Path] = [*(STOCK / each for each in STOCK_FOLDERS), folder]
    found = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if names and all(found.match_tasks([each]) == [each] for each in names):
        return found
    return TaskManager(include_path=str(folder), metadata=metadata)


@contextmanager
def lm_eval_reads(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Let lm-eval's command read the task files of `task_manager` for the length of the block."""

    def make(include_path: object = None, metadata: Any = None) -> TaskManager:
        return task_manager(folder, names, metadata)

    before = lm_eval.tasks.TaskManager
    lm_eval.tasks.TaskManager = cast("Any", make)  # its command takes the name from there
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = before


def load_tasks(names: Sequence[str], manager: TaskManager) -> dict[str, Task]:
    """Return tasks by their names, those of groups one by one; raise ConfigError where their data cannot be had."""
    try:
        return dict(manager.load(list(names))["tasks"])
    except SiriusError:
        raise
    except Exception as error:  # of the hub, of a data file, of a task's own code
        logging.getLogger(__name__).debug("loading tasks", exc_info=True)
        raise ConfigError(
            f"the data of {', '.join(names)} cannot be loaded ({type(error).__name__}: {error}); --data "
            "takes local files in place of the hub's"
        ) from error


def tell_limit(name: str, parts: Mapping[str, Task], limit: float | None) -> str | None:
    """Say how many problems a limit of lm-eval comes to in a group of tasks; None where the task is a single one.

    limit  problems of each task, or a fraction of them below 1, as lm-eval has it
    """
    if len(parts) == 1 or limit is None:
        return None
    count = sum(min(get_sample_size(task, limit) or 0, len(task.eval_docs)) for task in parts.values())
    return (
        f"{name} has {len(parts)} subtasks and --limit holds for each: {count:,} problems in all "
        "(sirius sweep limits the whole task)"
    )


def check_shots(name: str, task: Task, shots: int) -> None:
    """Raise ConfigError where a task cannot show so many worked examples, or shows none whatever is asked."""
    if task.config.num_fewshot == 0 and shots:
        raise ConfigError(f"{name} shows no worked examples, so {shots} would change nothing")
    count = len(list(task.fewshot_docs())) if shots else 0
    if shots > count:
        raise ConfigError(f"{name} has {count} worked examples; got {shots}")
