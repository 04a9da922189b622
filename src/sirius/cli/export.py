"""`sirius export`: a folder that transformers decodes our way, by itself or with a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from sirius.cli import arguments
from sirius.cli.evaluate import OTHERS
from sirius.cli.options import CommandLine, check_effect, setting_of
from sirius.cli.terminal import err, out, quieten, uncollected


def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The folder to write to.")],
    model: Annotated[
        str | None, typer.Option(help="A folder, GGUF file or hub id, whose checkpoint is written there too.")
    ] = None,
    sparsity: arguments.Sparsity = None,
    draft_bits: arguments.DraftBits = None,
    keep: arguments.Keep = 0.5,
    sparsity_threshold: arguments.SparsityThreshold = None,
    correct: arguments.Correct = True,
    preset: arguments.Preset = None,
    period: arguments.Period = "auto",
    accept: arguments.Accept = "lossless",
    threshold: arguments.Threshold = None,
    accept_temperature: arguments.AcceptTemperature = 0.6,
    tree_width: arguments.TreeWidth = 1,
    prune: arguments.Prune = 0.0,
    draft_confidence: arguments.DraftConfidence = 0.0,
    draft_ngram: arguments.DraftNgram = 0,
    per_branch: arguments.PerBranch = False,
    refresh: arguments.Refresh = 0.0,
    ablate: arguments.Ablate = None,
    dtype: arguments.Dtype = "auto",
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
) -> None:
    """Write a custom_generate for transformers: generate(custom_generate=FOLDER, trust_remote_code=True) decodes so."""
    command = CommandLine.of(context, **OTHERS)
    check_effect(command)
    with uncollected():
        quieten()
        from sirius.errors import FileError
        from sirius.hf.export import export as write
        from sirius.model.loading import Source, load_model, load_tokenizer
        from sirius.settings import make_setting

    setting = make_setting(setting_of(command))
    source = None if model is None else Source(model, revision, trust_remote_code, None).found()
    if source is not None and any(folder.glob("*.safetensors")):
        raise FileError(f"{folder} holds a checkpoint already; choose another folder, or leave --model out to keep it")
    write(folder, setting)
    if source is not None:
        with err.status("writing the checkpoint"):
            load_model(source, dtype, "cpu").save_pretrained(folder)
            if (tokenizer := load_tokenizer(source)) is not None:
                tokenizer.save_pretrained(folder)
    lossy = "" if setting.lossless else ", LOSSY"
    out.print(f"{folder} decodes by {setting.label()}{lossy}; load it with trust_remote_code=True", highlight=False)
