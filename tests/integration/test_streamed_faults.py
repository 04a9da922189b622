"""A fault of a disk in the midst of a text costs what it must, and nothing else."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from streaming import (  # noqa: F401 - fixtures
    COARSE,
    FOUR,
    NEW,
    PLAIN,
    PROMPT,
    PROMPTS,
    chain,
    failing,
    folder,
    shards,
    streamed,
    want,
    write,
)

from conftest import slow
from sirius.errors import FileError
from sirius.offload.ring import ThreadMover

pytestmark = pytest.mark.integration


def overwritten(folder: Path, size: int) -> dict[Path, bytes]:
    """Cut off every file of weights, and return what they held."""
    held = {path: path.read_bytes() for path in shards(folder)}
    [os.truncate(path, size) for path in held]
    return held


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy of the checkpoint."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("draft", [PLAIN, FOUR, COARSE], ids=["plain", "4 bits", "coarse"])
def test_a_file_that_is_cut_off_in_the_midst_of_a_text_costs_what_follows_and_nothing_else(own, want, draft):
    engine = streamed(own, "010 000", draft)
    updates, given = engine.stream(PROMPT, max_new_tokens=NEW, sparsity=draft, correction=chain(2)), []
    for _ in range(3):
        given += next(updates).round.tokens
    held = overwritten(own, 2000)
    with pytest.raises(FileError, match=r"safetensors ends at byte \d+, and \d+ are needed; it was cut off: fetch"):
        for update in updates:
            given += update.round.tokens
    assert 3 <= len(given) < NEW and given == want[0][: len(given)]
    with pytest.raises(FileError):
        write(engine, draft)
    [path.write_bytes(content) for path, content in held.items()]
    assert write(engine, draft) == want[0]


def test_a_file_that_is_replaced_under_its_name_is_read_on_as_it_was(own, want):
    engine = streamed(own, "000 000")
    updates = engine.stream(PROMPT, max_new_tokens=NEW, sparsity=PLAIN)
    given = list(next(updates).round.tokens)
    for path in shards(own):
        (own / "new").write_bytes(b"other")
        (own / "new").rename(path)
    assert given + [token for update in updates for token in update.round.tokens] == want[0]


def test_a_read_error_ends_the_texts_at_work_and_the_others_go_on(folder, want, monkeypatch):
    engine = streamed(folder, "010 010", FOUR)
    batch = engine.batch(rows=2, sparsity=FOUR, correction=chain(2))
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    batch.step()
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", failing(errno.EIO))
        updates = [update for _ in range(9) if len(batch.active) == 2 for update in batch.step()]
    failed = [update for update in updates if update.error]
    assert [update.ticket for update in failed] == tickets[:2]
    assert all(type(each.error) is FileError and "Input/output error" in str(each.error) for each in failed)
    done = {update.ticket: update for _ in range(99) if batch.busy for update in batch.step()}
    assert list(done) == tickets[2:] and list(done[tickets[2]].completion.token_ids) == want[2]


def test_a_read_error_at_a_prompt_is_that_texts_own_and_leaves_no_row_behind(folder, want, monkeypatch):
    engine = streamed(folder, "010 010", FOUR)
    batch = engine.batch(rows=3, sparsity=FOUR, correction=chain(2))
    first = batch.add(engine.text(PROMPTS[0], max_new_tokens=NEW))
    batch.step()
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", failing(errno.EIO))
        batch.add(engine.text(PROMPTS[1], max_new_tokens=NEW))
        [update] = batch.step()
    assert type(update.error) is FileError
    last = batch.add(engine.text(PROMPTS[2], max_new_tokens=NEW))
    done = {update.ticket: update for _ in range(99) if batch.busy for update in batch.step()}
    assert [list(done[ticket].completion.token_ids) for ticket in (first, last)] == [want[0], want[2]]


def test_a_read_error_leaves_the_model_to_other_threads(folder, want, monkeypatch):
    engine = streamed(folder, "000 000")
    preadv, fails = os.preadv, threading.Event()
    monkeypatch.setattr(os, "preadv", lambda *args: failing(errno.EIO)() if fails.is_set() else preadv(*args))
    updates = engine.stream(PROMPT, max_new_tokens=NEW, sparsity=PLAIN)
    next(updates)
    fails.set()
    with pytest.raises(FileError, match="Input/output error"):
        list(updates)
    fails.clear()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(write, engine).result(60) == want[0]


@pytest.mark.parametrize(("draft", "call"), [(FOUR, "pwrite"), (COARSE, "pwrite"), (COARSE, "fdatasync")], ids=str)
def test_a_full_disk_for_what_drafts_read_is_named_and_the_next_text_is_whole(folder, want, monkeypatch, draft, call):
    engine = streamed(folder, "110 010", draft)
    with monkeypatch.context() as full:
        full.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(FileError, match="No space left on device; set TMPDIR to a folder with more room"):
            write(engine, draft)
        assert write(engine, PLAIN) == want[0]
    assert write(engine, draft) == want[0]


@pytest.mark.parametrize("calls", [1, 9, 20, *map(slow, (2, 3, 4, 14, 27, 33))])
def test_a_text_after_one_that_was_interrupted_is_whole(folder, want, monkeypatch, calls):
    engine, left, wait = streamed(folder, "100 010", COARSE, buffers=2), [calls], ThreadMover.wait

    def interrupted(self, arrival):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        wait(self, arrival)

    monkeypatch.setattr(ThreadMover, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(engine, COARSE)
    assert write(engine, COARSE) == want[0]
