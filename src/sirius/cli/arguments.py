"""The options that several commands have, each with its help, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="A folder, GGUF file or hub id; the embedded model if left out.")]
Sparsity = Annotated[
    str | None,
    typer.Option(help="coarse (griffin), fine (cats), none, or a plug-in. [default: none; coarse with --preset]"),
]
DraftBits = Annotated[
    str | None,
    typer.Option(
        help="Bits of the draft's weights: 4, 8, auto (8 for a small model, else 4), or 0 for the model's own. "
        "[default: auto; 0 with --sparsity or --preset]"
    ),
]
DraftNgram = Annotated[
    int, typer.Option(help="Prompt lookup: longest run of last tokens that is looked up earlier in the text; 0 is off.")
]
DraftConfidence = Annotated[
    float, typer.Option(help="End a chain after a guess to which the draft gives less probability; 0 is off.")
]
Keep = Annotated[float, typer.Option(help="Fraction of the neurons kept, 0 < keep <= 1.")]
SparsityThreshold = Annotated[
    float | None, typer.Option(help="For fine: keep |act(gate)| above this instead of a fraction.")
]
Correct = Annotated[bool, typer.Option("--correct/--no-correct", help="Let the full model correct the draft.")]
Preset = Annotated[
    str | None,
    typer.Option(help="paper: period 16, accept threshold, threshold 0.1 (lossy). Options given beside it win."),
]
Period = Annotated[str, typer.Option(help="Tokens of a branch that one check reads; auto drafts where that is faster.")]
Accept = Annotated[
    str, typer.Option(help="lossless (or argmax, sampling); threshold (the paper's), relative, typical are lossy.")
]
Threshold = Annotated[
    float | None, typer.Option(help="Least probability of an accepted token, for a lossy rule. [default: 0.1]")
]
AcceptTemperature = Annotated[float, typer.Option(help="Temperature of that probability.")]
TreeWidth = Annotated[int, typer.Option(help="Branches drafted side by side.")]
Prune = Annotated[float, typer.Option(help="Drop branches under this share of the best one's probability.")]
PerBranch = Annotated[bool, typer.Option("--per-branch", help="For fine: a set of neurons for each branch of a tree.")]
Refresh = Annotated[float, typer.Option(help="For coarse: share of a checked window in its statistic.")]
Ablate = Annotated[
    list[str] | None, typer.Option(help="For studies, lossy: leave out rewrite, interleave or rollback.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability in all.")]
TopK = Annotated[int, typer.Option(help="Sample from so many likeliest tokens; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens under this share of the likeliest one's.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="[default: the checkpoint's]")]
Seed = Annotated[int | None, typer.Option(help="The same seed samples the same text.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Budget of new tokens. [default: 256 or the room left]")]
MaxContext = Annotated[
    int | None,
    typer.Option(help="Most tokens of a prompt and its text, past the model's own limit too. [default: that]"),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(help="8GiB, 500MB or 50%: what has no room stays in the model's files until a pass needs it."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends the text; may be given again. [default: the checkpoint's]"),
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Put the prompt in the chat template. [default: embedded model only]"),
]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's; bfloat16 of a GGUF file), float32, bfloat16, float16, float64.")
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Data = Annotated[Path | None, typer.Option(help="A folder of local files of the tasks' sets, in place of the hub's.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, help="Texts decoded side by side.")]
