"""Grids of settings: a file says which settings decode which tasks, and which values are chosen on other items."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from sirius.core import AUTO
from sirius.errors import ConfigError, FileError
from sirius.evaluation.catalogue import setting_for
from sirius.settings import NAMES, NONE, Setting

STUDIES = Path(__file__).parent / "studies"
KEYS = ("tasks", "limit", "validation", "shots", "chat", "grids")
CHOOSE = "choose"


@dataclass(frozen=True)
class Grid:
    """What a sweep decodes.

    tasks       names of lm-eval
    limit       items of each task that are tested, None: all
    validation  items after those, on which values are chosen; they are never tested
    shots       worked examples before a question, None: the task's own number
    chat        whether prompts go through the model's chat template
    grids       each a mapping of setting names to values, or lists of them, or {"choose": a list}
    """

    tasks: tuple[str, ...]
    grids: tuple[Mapping[str, Any], ...]
    limit: int | None = None
    validation: int = 0
    shots: int | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not all(isinstance(each, str) for each in self.tasks):
            raise ConfigError(f"tasks is a list of task names, at least one; got {list(self.tasks)!r}")
        for name, least in (("limit", 1), ("validation", 0), ("shots", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is a whole number of at least {least}; got {value!r}")
        if type(self.chat) is not bool:
            raise ConfigError(f"chat is true or false; got {self.chat!r}")
        if not self.grids or not all(isinstance(each, Mapping) and each for each in self.grids):
            raise ConfigError("grids is a list of mappings of setting names to values, at least one")
        for each in self.grids:
            if unknown := sorted(map(str, each.keys() - set(NAMES))):
                raise ConfigError(f"a grid has no {', '.join(unknown)}; it may have {', '.join(NAMES)}")
            for name, values in each.items():
                _values(name, values)
        if any(_chosen(each) for each in self.grids) and not (self.validation and self.limit):
            raise ConfigError(
                "values are chosen on items that are not tested: set limit (those tested) and validation (those after)"
            )
        for task in self.tasks:  # every setting is made once, so that a bad one is told at the beginning
            for each in self._settings(task):
                _check_repeatable(each)

    def settings(self) -> list[Setting]:
        """Return the settings of all tasks, those to choose from too, each once."""
        return list(dict.fromkeys(each for task in self.tasks for each in self._settings(task)))

    def _settings(self, task: str) -> list[Setting]:
        return [*self.fixed(task), *(each for _, options in self.choices(task) for each in options)]

    def fixed(self, task: str) -> list[Setting]:
        """Return the settings of a task that are tested as they are, each once."""
        found = (setting_for(task, values) for each in self.grids if not _chosen(each) for values in _products(each))
        return list(dict.fromkeys(found))

    def choices(self, task: str) -> list[tuple[str, list[Setting]]]:
        """Return groups of settings of a task, of each of which the best one is tested, with the group's name."""
        groups = []
        for each in self.grids:
            if not (names := _chosen(each)):
                continue
            open_values = {name: each[name][CHOOSE] for name in names}
            for base in _products({name: value for name, value in each.items() if name not in names}):
                options = [setting_for(task, {**base, **own}) for own in _products(open_values)]
                said = ", ".join(f"{name} {value}" for name, value in base.items())
                among = ", ".join(f"{name} {'/'.join(map(str, own))}" for name, own in open_values.items())
                groups.append((f"{said}; best of {among}", list(dict.fromkeys(options))))
        return groups


def read_grid(name: str, changes: Mapping[str, Any]) -> Grid:
    """Return the grid of a file, or of a study of ours by its name.

    changes  values in place of the file's, None leaves those

    Raises FileError where there is none, ConfigError where it is no grid.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml", ".json") else STUDIES / f"{name}.yaml"
    if not path.is_file():
        raise FileError(f"there is no grid {name!r}; give a YAML file, or one of {', '.join(study_names())}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FileError(f"cannot read {path}: {' '.join(str(error).split())}") from error  # YAML's errors have lines
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} must be a mapping of {', '.join(KEYS)}")
    if unknown := sorted(map(str, found.keys() - set(KEYS))):
        raise ConfigError(f"{path} has {', '.join(unknown)}; a grid has {', '.join(KEYS)}")
    asked = {**found, **{key: value for key, value in changes.items() if value is not None}}
    tasks, grids = asked.pop("tasks", ()), asked.pop("grids", ())
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not isinstance(grids, Sequence):
        raise ConfigError(f"{path}: tasks and grids are lists")
    return Grid(tuple(tasks), tuple(grids), **asked)


def study_names() -> list[str]:
    """Return the names of our own studies."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def _check_repeatable(setting: Setting) -> None:
    """Raise ConfigError of a setting whose texts are not the same in another run."""
    if setting.sparsity.shared_set:
        raise ConfigError("shared_set makes a text depend on those decoded beside it, so that a sweep cannot resume")
    if setting.correction is not None and setting.correction.period == AUTO and not setting.lossless:
        raise ConfigError(
            f"{setting.label()}: a lossy text of period auto depends on the speed of the machine; give a period"
        )


def _chosen(grid: Mapping[str, Any]) -> list[str]:
    return [name for name, value in grid.items() if isinstance(value, Mapping)]


def _values(name: str, given: Any) -> list[Any]:
    """Return the values of one name of a grid; a value of `ablate` is a text like "rewrite+rollback"."""
    if isinstance(given, Mapping):
        if set(given) != {CHOOSE} or not isinstance(given[CHOOSE], list) or len(given[CHOOSE]) < 2:
            raise ConfigError(f"{name} is a value, a list, or choose: with a list of at least two; got {dict(given)!r}")
        return given[CHOOSE]
    if isinstance(given, list):
        if not given:
            raise ConfigError(f"{name} has an empty list; give it at least one value")
        return given
    return [given]


def _products(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of a grid's values; the full model is one setting, whatever else the grid says."""
    names = list(grid)
    for values in product(*(_values(name, grid[name]) for name in names)):
        found = dict(zip(names, values, strict=True))
        yield {"sparsity": NONE} if found.get("sparsity") == NONE else found
