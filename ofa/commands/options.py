"""Shared options of the commands, single and in groups, and the YAML file that sets them."""

from __future__ import annotations

import csv
import functools
import inspect
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel

from ofa.commands.console import notice, reports_errors, set_quiet
from ofa.errors import InputError, first_sentence, refuse_surrogates
from ofa.files import Json, at_home
from ofa.tasks.columns import did_you_mean
from ofa.tasks.sampling import Shots
from ofa.threads import use_threads

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Hub id, model folder, or GGUF file; also an encoder such as BERT, except in compare and probe. Without "
        "it: the adapter's base, or SmolLM2-135M-Instruct if there is no adapter (90 MB, downloaded once).",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="Dtype of the model's weights: float32, bfloat16 or float16. Norm scales stay float32.")
]
DeviceOption = Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, cuda:N or mps.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Do not use the network, only local copies.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a model. Only for models you trust.")
]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=set_quiet, help="Print only results, warnings and errors; no progress."),
]


def _shots(given: str | int) -> Shots:
    """Parse `--shots`, also its default."""
    value = str(given)
    if value == "all":
        return "all"
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"{value} is neither a number of at least 1 nor all")
    return int(value)


ShotsOption = Annotated[
    Any, typer.Option(parser=_shots, metavar="N|all", help="Examples per class, drawn by --seed, or all.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads. Without it OMP_NUM_THREADS, else the number of idle cores."),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Texts per batch when predicting.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Write into an output folder that is not empty.")]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        help=r'Prompt with {text}, such as "Sentence: {text}\nLabel:", or with any columns of the data by name. '
        r"\n is a line break, \t a tab, \\n a backslash and an n; {{ and }} are braces."
    ),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        help="Label words, separated by commas; put a word with a comma in double quotes, as in 'yes,\"no, never\"'. "
        "Numbers 0, 1, … in the data mean these words in order. Without it: the labels that occur, sorted."
    ),
]
TextColumnOption = Annotated[
    str | None, typer.Option(help="The column that {text} stands for. Without it: text, or prompt without labels.")
]
LabelColumnOption = Annotated[
    str | None, typer.Option(help="The column of the labels. Without it: label, or completion without labels.")
]
SeparatorOption = Annotated[
    str | None,
    typer.Option(help='Separator of a CSV file, such as ";" or tab. Without it: detected from the file.'),
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put the prompt into the user's turn of the model's chat template. Off by default; a message "
        "says so if the model has a chat template. An adapter keeps the choice.",
    ),
]
SystemOption = Annotated[str | None, typer.Option(help="System prompt of a chat. Without it the chat template's own.")]
FORMATS = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, each also as .gz"
DATA_FILES = f"a file with columns text and label, or those of the template ({FORMATS})"


@dataclass(frozen=True)
class ModelOptions:
    """The model of a command: arguments of `load_model`."""

    model: ModelOption = None
    dtype: DtypeOption = "float32"
    device: DeviceOption = "auto"
    offline: OfflineOption = False
    trust_remote_code: TrustOption = False


@dataclass(frozen=True)
class DataOptions:
    """How to read the data of a command, as typed."""

    template: TemplateOption = None
    labels: LabelsOption = None
    text_column: TextColumnOption = None
    label_column: LabelColumnOption = None
    separator: SeparatorOption = None


@dataclass(frozen=True)
class ChatOptions:
    """Whether the prompt is a chat."""

    chat: ChatOption = None
    system: SystemOption = None


@dataclass(frozen=True)
class Only:
    """Annotation that limits a command's options to these fields of a configuration."""

    names: tuple[str, ...]


_CONTEXT = "context"


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command of a function: report its errors, and add --quiet and --config, whose callbacks do the work.

    Parameters that are dataclasses or pydantic configurations become one option per field. A dataclass field has its
    option in its annotation; a configuration field's description becomes the help text. A configuration gets only the
    options that were given, so `model_fields_set` separates them from the defaults.
    """
    signature = inspect.signature(function, eval_str=True)
    options: dict[str, Parameter] = {}
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for name, parameter in signature.parameters.items():
        own = {option.name: option for option in _options_of(parameter.annotation)}
        options |= own or {name: parameter}
        if own:
            groups[name] = (get_args(parameter.annotation) or (parameter.annotation,))[0], list(own)

    @functools.wraps(function)
    def run(**given: Any) -> Any:
        context = given[_CONTEXT] if _CONTEXT in signature.parameters else given.pop(_CONTEXT)
        del given["quiet"], given["config"]
        for name, (kind, names) in groups.items():
            values = {option: given.pop(option) for option in names}
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                values = {option: value for option, value in values.items() if _is_given(context, option)}
            given[name] = kind(**values)
        return function(**given)

    options["quiet"] = Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption)
    options["config"] = Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption)
    options[_CONTEXT] = Parameter(_CONTEXT, Parameter.KEYWORD_ONLY, annotation=typer.Context)
    by_name = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options.values()]
    run.__signature__ = signature.replace(parameters=by_name)  # type: ignore[attr-defined]
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    return reports_errors(run)


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether an option was typed, or stands in the file of `--config`."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _options_of(annotation: Any) -> Iterator[Parameter]:
    """The options of a group; none if the annotation is not a group."""
    kind, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        only = next((mark.names for mark in marks if isinstance(mark, Only)), None)
        own_first = dict.fromkeys(name for one in _kinds(kind) for name in inspect.get_annotations(one))
        yield from (_setting(kind, name) for name in own_first if only is None or name in only)


def _kinds(config: type[BaseModel]) -> list[type[BaseModel]]:
    """A configuration and its bases that are configurations."""
    return [kind for kind in config.__mro__ if issubclass(kind, BaseModel) and kind is not BaseModel]


def _setting(config: type[BaseModel], name: str) -> Parameter:
    """The option of a field, in the help panel of its declaring configuration, which validates it."""
    field = config.model_fields[name]
    panel = next(kind for kind in _kinds(config) if name in inspect.get_annotations(kind)).model_config["title"]
    typed = str if _takes_words(field.annotation) else field.annotation
    option = typer.Option(help=field.description, rich_help_panel=panel)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[typed, option])


def _takes_words(annotation: Any) -> bool:
    """Whether a field takes words, alone or beside numbers: `Literal["auto"]`, `float | Literal["auto"]`."""
    kinds = get_args(annotation)
    return get_origin(annotation) is Literal or (
        NoneType not in kinds and any(get_origin(kind) is Literal for kind in kinds)
    )


def set_threads(threads: int | None) -> None:
    """Set PyTorch's threads to `--threads`, or by default to the idle cores, with a notice if some are busy."""
    found = use_threads(threads)
    if found is not None and found.free < found.allowed:
        notice(
            f"ofa: computing with {found.free} {'thread' if found.free == 1 else 'threads'}: of {found.allowed} cores "
            f"other processes use {found.busy:.1f}{'' if found.quota is None else f', the quota is {found.quota:g}'} "
            "(--threads chooses)"
        )


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config`: entries of the YAML file become the command's defaults, which flags override.

    Raises:
        InputError: the file cannot be read, is not a mapping, or names an option that the command does not have.
    """
    if path is None:
        return None
    known = {_written(parameter): parameter for parameter in context.command.params if parameter.name != "config"}
    values = {str(name).replace("-", "_"): value for name, value in read_mapping(path).items()}
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        hint = did_you_mean(unknown, tuple(known)) or f"; use one of {', '.join(sorted(known))}"
        raise InputError(f'{path} sets "{unknown}", which is no option{hint}')
    given = {known[name].name: _as_typed(value, name, known[name], path) for name, value in values.items()}
    context.default_map = {**(context.default_map or {}), **given}
    return path


def _written(parameter: Any) -> str:
    """The name of an option as the user writes it, without dashes: `json`, not `as_json`."""
    flags = [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]
    return (flags[0] if flags else parameter.name).replace("-", "_")


_LISTS = ("labels", "tasks", "seeds", "contexts")
"""Options that are comma-separated on the command line, and may be a list in YAML."""


def _as_typed(value: Any, name: str, parameter: Any, path: Path) -> str | list[str] | None:
    """A YAML value as it would be typed after its flag, so that both are validated alike.

    Raises:
        InputError: the value cannot be typed on the command line.
    """
    repeats = getattr(parameter, "multiple", False) or getattr(parameter, "nargs", 1) == -1
    if name == "methods" and isinstance(value, list | dict):
        return json.dumps(value, default=str)
    items = value if isinstance(value, list) and (repeats or name in _LISTS) else [value]
    for item in items:
        if isinstance(item, list | dict):
            raise InputError(f"{path} sets {name} to {item!r}; write one plain value")
        if isinstance(item, bool) and not getattr(parameter, "is_flag", False):
            raise InputError(f"{path} sets {name} to {item}, as YAML reads it; write the value in quotes")
    if value is None:
        return None
    typed = [str(item) for item in items]
    for item in typed:
        refuse_surrogates(item, f"{path} sets {name} to {item!r}, which")
    return typed if repeats else _joined(typed) if len(typed) > 1 else typed[0] if typed else None


def _joined(items: list[str]) -> str:
    """A list as one line of CSV, since a label may have a comma."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(items)
    return line.getvalue()


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=read_config, is_eager=True, help="YAML file with the same names as these options."
    ),
]


def read_mapping(path: Path) -> Json:
    """Read a mapping from a YAML file.

    Raises:
        InputError: it cannot be read, or is not a mapping.
    """
    import yaml

    try:
        value = yaml.safe_load(at_home(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the configuration {path} cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the configuration {path} is not valid YAML ({_first_fault(error)}); correct it") from error
    if not isinstance(value, dict):
        raise InputError(f"the configuration {path} is not a list of `name: value` lines; write it that way")
    return value


def _first_fault(error: Exception) -> str:
    """The YAML parser's message and position, without its excerpt of the file."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return first_sentence(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'unreadable'}"
