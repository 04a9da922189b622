"""A folder whose `custom_generate` makes transformers decode our way, in programs that do not know of sirius.

`model.generate(custom_generate=FOLDER, trust_remote_code=True)` takes it, and where the folder holds a checkpoint too,
`from_pretrained(FOLDER, trust_remote_code=True)` gives a model that always decodes so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sirius.core import OWN
from sirius.errors import FileError
from sirius.hf.door import bind
from sirius.settings import NAMES, SPARSE, Setting, make_setting

OURS = '"""Decodes with sirius (pip install sirius-llm); written by `sirius export`."""'  # by which a file is known
BODY = '''

import json

from sirius.hf.export import generate_with

SETTING = json.loads({setting!r})


def generate(*args, model, **kwargs):
    """Decode with the setting above; keywords of the same names win over it."""
    return generate_with(SETTING, model, *args, **kwargs)
'''


def export(folder: Path, setting: Setting) -> Path:
    """Write a `custom_generate` that decodes with a setting, and return its file.

    Raises FileError where it cannot be written, or stands there already and is not ours.
    """
    path = folder / "custom_generate" / "generate.py"
    try:
        if path.exists() and not path.read_text(encoding="utf-8").startswith(OURS):
            raise FileError(f"{path} is there and was not written by sirius; choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OURS + BODY.format(setting=json.dumps(setting.flat())), encoding="utf-8")
        (path.parent / "requirements.txt").write_text("sirius-llm\n", encoding="utf-8")
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def generate_with(values: Mapping[str, Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a model's own `generate` with `decode` and a setting; keywords with names of a setting change it.

    values  as `make_setting` takes them
    """
    own = {name: kwargs.pop(name) for name in NAMES if name in kwargs}
    if own.get("accept") in OWN and "threshold" not in own:
        values = {name: value for name, value in values.items() if name != "threshold"}
    if own.get("sparsity") is not None:  # another draft altogether
        values = {name: value for name, value in values.items() if name not in SPARSE}
    setting = make_setting({**values, **own})
    for name in ("custom_generate", "trust_remote_code"):
        kwargs.pop(name, None)
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    handed = {name: kwargs.pop(name, None) for name in ("streamer", "tokenizer", "stop_strings")}
    kwargs |= {"sparsity": setting.sparsity, "correction": setting.correction}
    bound = bind(model, config, **handed)
    # the class's own: the model's may be what calls this
    return type(model).generate(model, *args, custom_generate=bound, stop_strings=None, **kwargs)
