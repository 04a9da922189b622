"""The command `sirius`: parse, call one function, print."""

import os
import sys
from typing import Annotated

import typer

from sirius import __version__
from sirius.cli.bench import bench_app
from sirius.cli.bench_offload import offload
from sirius.cli.demo import demo
from sirius.cli.evaluate import evaluate
from sirius.cli.export import export
from sirius.cli.generate import generate
from sirius.cli.plan import plan
from sirius.cli.report import report
from sirius.cli.streams import guarded
from sirius.cli.sweep import sweep
from sirius.cli.terminal import INTERRUPTED, UNREAD, WRONG_INPUT, complain, out
from sirius.cli.trace import trace
from sirius.errors import SiriusError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the options' names at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Faster decoding of large language models: a cheap version of the model drafts, the full model corrects.",
)
app.command()(generate)
app.command()(demo)
app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(evaluate)
app.command()(sweep)
app.command()(export)
app.command()(trace)
app.command()(report)
app.command()(plan)
bench_app.command()(offload)
app.add_typer(bench_app, name="bench")


SPINS = "GOMP_SPINCOUNT", "100"
SPINNING = {"OMP_WAIT_POLICY", SPINS[0]}  # what a user may have set


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2, never a traceback."""
    _spin_little()
    try:
        with guarded():
            app(prog_name="sirius")
    except SiriusError as error:
        complain(str(error))
        sys.exit(WRONG_INPUT)
    except BrokenPipeError:
        sys.exit(UNREAD)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's exit code of Ctrl-C
            complain("interrupted")
        raise


def _spin_little() -> None:
    """Let threads that wait for each other sleep soon; OpenMP reads this when torch is imported.

    Beside another busy program they would spin on the CPU that the last of them waits for. A 135M model on two CPUs,
    one of them busy, then keeps a third of its speed; with this it keeps two thirds (dev/2026-11-28-threads.md).
    """
    if not SPINNING & os.environ.keys():
        os.environ[SPINS[0]] = SPINS[1]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"sirius {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Faster decoding of large language models: a cheap version of the model drafts, the full model corrects."""
