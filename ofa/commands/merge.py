"""`ofa merge`: write a checkpoint or a GGUF file with the adapter's scales, for serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ofa.commands.console import notice
from ofa.commands.options import ModelOption, OfflineOption, OverwriteOption, TrustOption, command
from ofa.errors import InputError


@command
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that `ofa fit` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged checkpoint, or with --gguf the new .gguf file.")],
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="A GGUF file of the base, at any quantization. It is copied, and only its float32 norms are replaced "
            "by the adapter's."
        ),
    ] = None,
    model: ModelOption = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of the checkpoint: auto (the base's; float32 for a GGUF file), float32, bfloat16 or float16."
        ),
    ] = "auto",
    overwrite: OverwriteOption = False,
    offline: OfflineOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write the base model with the adapter in it as one ordinary checkpoint, or norm scales into a GGUF file.

    Example: ofa merge adapter --out checkpoint

    For llama.cpp: ofa merge adapter --gguf base.Q4_K_M.gguf --out tuned.gguf
    """
    if gguf is not None:
        if model is not None or dtype != "auto":
            raise InputError("--gguf names the base and keeps its types: leave out --model and --dtype")
        _merge_gguf(adapter, gguf, out, overwrite)
        return
    from ofa.commands.adapted import base_of
    from ofa.files import claimed_folder
    from ofa.models.load import check_source, load_model

    base = base_of(adapter, model)
    check_source(base, dtype=dtype)
    with claimed_folder(out, overwrite=overwrite) as target:
        from ofa.adapters.peft_folder import refuse_soft_prompt
        from ofa.adapters.read import read_any_adapter
        from ofa.adapters.save_and_load import merge as write_merged

        refuse_soft_prompt(read_any_adapter(adapter))  # fail before downloading the base
        loaded = load_model(
            base,
            dtype=dtype,
            device="cpu",
            offline=offline,
            trust_remote_code=trust_remote_code,
            progress=notice,
            tokenizer_as_it_came=True,
        )
        write_merged(loaded.model, adapter, target, tokenizer=loaded.tokenizer, overwrite=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    notice(
        f"merged checkpoint: {target} ({size / 1e6:.0f} MB), loads with {type(loaded.model).__name__}.from_pretrained"
    )


def _merge_gguf(adapter: Path, base: Path, out: Path, overwrite: bool) -> None:
    from ofa.adapters.gguf_norms import merge_gguf

    written = merge_gguf(adapter, base, out, overwrite=overwrite)
    notice(f"merged GGUF file: {written} ({written.stat().st_size / 1e6:.0f} MB); only its norms differ from {base}")
