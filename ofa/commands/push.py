"""`ofa push`: publish an adapter on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ofa.commands.console import notice, reports_errors, show
from ofa.commands.options import (
    ConfigOption,
    QuietOption,
)


@reports_errors
def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder that `ofa fit` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub, created for it.")],
    base_model: Annotated[
        str | None,
        typer.Option(metavar="HUB_ID", help="The base model's hub id, if the adapter was made from a local model."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a repository that only its owner sees.")] = False,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Also upload the records and the figure of the training run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Commit to an existing repository.")] = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Publish an adapter and its model card on the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN.

    Example: ofa push adapter me/reviews-ofa
    """
    from ofa.adapters.folder import read_config

    read_config(adapter)
    from ofa.adapters.push import push_to_hub

    page = push_to_hub(
        adapter, repo_id, private=private or None, base_model=base_model, overwrite=overwrite, metrics=metrics
    )
    show(page)
    notice(f'try: AutoPeftModelForCausalLM.from_pretrained("{"/".join(page.split("/")[-2:])}")')
