"""The command line: adapt and use a model, compare methods, inspect models and the installation."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ofa._version import __version__
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
from ofa.commands.report import report
from ofa.commands.suggest import suggest
from ofa.errors import InputError, refuse_surrogates

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adapt a language model from five examples per class by tuning only its norm scales. Start with `ofa demo`.",
)
for command in (demo, fit, evaluate, predict, suggest, compare, report, probe, merge, inspect, doctor):
    app.command()(command)


# Typer vendors click or uses the installed one; this is the base class of usage errors in both.
_UsageError: Any = typer.BadParameter.__base__

_OTHER_NAMES = {
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--num-epochs": "--epochs",
    "--k": "--shots",
    "--num-shots": "--shots",
    "--output": "--out",
    "--output-dir": "--out",
    "-o": "--out",
    "--dataset": "--data",
    "--input": "--data",
    "--base-model": "--model",
    "-m": "--model",
    "--gradient-accumulation-steps": "--accumulation",
    "--force": "--overwrite",
}
"""Names of options in other programs, for those not similar to ours."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"ofa-adapt {__version__}")
        raise typer.Exit()


@app.callback()
def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the console script; also prints usage errors as one sentence."""
    try:
        for argument in sys.argv:
            refuse_surrogates(argument, f"the argument {argument}")
        status = app(prog_name="ofa", standalone_mode=False)
    except InputError as error:
        fail(error)
    except typer.Abort:
        raise SystemExit(130) from None
    except _UsageError as error:
        message = _message(error)
        if not message:  # no arguments at all: the help was shown
            raise SystemExit(2) from None
        command = error.ctx.command_path if error.ctx else "ofa"
        fail(InputError(f"{message}; `{command} --help` lists the options"))
    raise SystemExit(status or 0)


def _message(error: Any) -> str:
    """The usage error as part of a sentence, with the most similar option."""
    if not hasattr(error, "possibilities"):
        message = " ".join(error.format_message().split()).rstrip(".?")
        return message[:1].lower() + message[1:]
    given = error.option_name.replace("_", "-")
    known = [flag for parameter in error.ctx.command.params for flag in parameter.opts] if error.ctx else []
    meant = [name for name in (given, _OTHER_NAMES.get(given), *(error.possibilities or ())) if name in known]
    return f"no such option: {error.option_name}" + (f" (did you mean {meant[0]}?)" if meant else "")


if __name__ == "__main__":
    main()
