"""What an installation says of itself is what the repository says."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_address_is_one_that_the_readme_gives():
    readme = (ROOT / PROJECT["readme"]).read_text(encoding="utf-8")
    assert PROJECT["urls"] and all(address in readme for address in PROJECT["urls"].values())


def test_the_least_python_is_the_first_that_is_classified():
    versions = re.findall(r":: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={versions[0]}"
