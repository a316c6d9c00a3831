"""The command line: `ofa fit`, `evaluate`, `predict`, `merge`, `inspect`, `doctor`, `demo`."""

from __future__ import annotations

import typer

from ofa.commands.console import fail
from ofa.commands.demo import demo
from ofa.commands.doctor import doctor
from ofa.commands.evaluate import evaluate
from ofa.commands.fit import fit
from ofa.commands.inspect import inspect
from ofa.commands.merge import merge
from ofa.commands.predict import predict
from ofa.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adapt a language model from five examples per class by tuning only its norm scales. Start with `ofa demo`.",
)
for command in (demo, fit, evaluate, predict, merge, inspect, doctor):
    app.command()(command)


def main() -> None:
    """Entry point of the console script: errors in the options are one sentence too."""
    try:
        app()
    except InputError as error:
        fail(error)


if __name__ == "__main__":
    main()
