"""`sirius plan`: what of a model stays in memory under a budget, and what a token then takes; nothing is loaded."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from sirius.cli.terminal import out, quieten
from sirius.errors import ConfigError

GIGA = 1e9


def plan(
    shape: Annotated[str, typer.Option(help="llama-3-8b, llama-3-70b, ..., a config.json or its folder.")],
    memory_budget: Annotated[str, typer.Option(help="24GiB, 8GB, bytes, or a share of this device's memory: 50%.")],
    link_gbps: Annotated[float, typer.Option(help="GB/s at which weights come to the device.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many of its layers.")] = None,
    memory_gbps: Annotated[float, typer.Option(help="GB/s of the device's memory.")] = 1000.0,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "bfloat16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and text.")] = 1024,
    draft_bits: Annotated[int, typer.Option(help="Bits of the rounded draft: 4 or 8.")] = 4,
    keep: Annotated[float, typer.Option(help="Fraction of the neurons that coarse keeps.")] = 0.5,
    period: Annotated[int, typer.Option(min=2, help="K of the corrected rows.")] = 16,
    aal: Annotated[
        float | None,
        typer.Option(help="Tokens of a round, of all corrected rows. [default: 15.22 for coarse, 12.7 for 4 bits]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plans as JSON.")] = False,
) -> None:
    """Plan a model that is larger than its device: what stays, what is streamed, and the predicted time per token."""
    quieten()
    from sirius.benchmark.models import make_config
    from sirius.benchmark.plans import Question, plan_rows, show_plans
    from sirius.benchmark.record import to_line
    from sirius.core import LONGEST, SparsityConfig
    from sirius.model.limits import MOST_READ
    from sirius.model.loading import find_device, find_dtype
    from sirius.offload.amounts import memory_of, parse_budget
    from sirius.offload.plan import Link
    from sirius.offload.sizes import sizes_of

    if not draft_bits:
        raise ConfigError("--draft-bits is 4 or 8; got 0")
    both = SparsityConfig("coarse", keep, draft_bits=draft_bits)
    budget = parse_budget(memory_budget, memory_of(find_device("auto")))
    sizes = sizes_of(make_config(shape, layers), find_dtype(dtype), both, context + LONGEST, MOST_READ)
    question = Question(sizes, draft_bits, budget, Link(link_gbps * GIGA), memory_gbps * GIGA, period, aal)
    rows = plan_rows(question)
    if json:
        found = [{**asdict(row), "seconds_per_token": row.plan.seconds_per_token} for row in rows]
        sys.stdout.write(to_line({"shape": shape, "layers": layers, "dtype": dtype, **asdict(question), "rows": found}))
    else:
        out.print(show_plans(question, rows))
