"""Run a function in a process of its own, so that the memory it takes is its own."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sirius.errors import ModelError, SiriusError

Result = TypeVar("Result")


def run_apart(call: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a fresh process and return its result; function, arguments and result must be picklable.

    Raises what the function raises of ours, and ModelError where its process ends in another way.
    """
    processes = get_context("spawn")  # a fork would hold this process's memory
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_answer, args=(theirs, call, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        answer: Any = ours.recv()
    except EOFError as error:
        process.join()
        raise ModelError(
            f"the process of a measurement ended with code {process.exitcode} and no result; it may have run out of "
            "memory: close other programs, or take a smaller model"
        ) from error
    except BaseException:
        process.terminate()
        raise
    finally:
        ours.close()
        process.join()
    if isinstance(answer, SiriusError):
        raise answer
    return answer


def _answer(connection: Connection, call: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Send the result of a call, or the error that it raises of ours."""
    try:
        answer: object = call(*arguments)
    except SiriusError as error:
        answer = error
    except KeyboardInterrupt:  # the other end is told by its own
        return
    connection.send(answer)
