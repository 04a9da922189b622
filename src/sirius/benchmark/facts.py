"""What a measurement depends on besides its subject: machine, versions, commit."""

import platform
import subprocess
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from sirius.kernels.cpu import instructions


def facts(command: str, threads: int) -> dict[str, object]:
    """Return time, machine, versions and commit of a measurement made with `command` on so many threads."""
    now = datetime.now()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": now.date().isoformat(),
        "time": now.time().isoformat("seconds"),
        "commit": _commit(),
        "machine": _processor(),
        "gpu": gpu,
        "kernels": instructions(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "sirius": version("sirius-llm"),
        "command": command,
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in; None where it is installed elsewhere."""
    here = Path(__file__)
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", here.name])  # not of a project that only has sirius installed
        return git(["git", "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
