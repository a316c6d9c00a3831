"""The command line: adapt and use a model, compare methods, look into models and machines."""

from __future__ import annotations

from typing import Any

import typer

from ofa.commands.compare import compare
from ofa.commands.console import fail
from ofa.commands.demo import demo
from ofa.commands.doctor import doctor
from ofa.commands.evaluate import evaluate
from ofa.commands.fit import fit
from ofa.commands.inspect import inspect
from ofa.commands.merge import merge
from ofa.commands.predict import predict
from ofa.commands.probe import probe
from ofa.commands.push import push
from ofa.commands.report import report
from ofa.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adapt a language model from five examples per class by tuning only its norm scales. Start with `ofa demo`.",
)
for command in (demo, fit, evaluate, predict, compare, report, probe, merge, push, inspect, doctor):
    app.command()(command)


# Typer brings a click of its own or takes the installed one; this is the base of what either raises for wrong options.
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point of the console script: errors in the options are one sentence too."""
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        fail(error)
    except typer.Abort:
        raise SystemExit(130) from None
    except _UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".?")
        if not message:  # no arguments at all: the help was shown
            raise SystemExit(2) from None
        command = error.ctx.command_path if error.ctx else "ofa"
        fail(InputError(f"{message[0].lower()}{message[1:]}; `{command} --help` shows how it is used"))
    raise SystemExit(status or 0)


if __name__ == "__main__":
    main()
