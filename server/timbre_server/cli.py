"""The command ``timbre``: flags are made from `Settings`, so that no option is written down twice."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from importlib import metadata

from pydantic.fields import FieldInfo

from timbre_server.convert import Conversion, ConversionError, add_arguments, convert
from timbre_server.settings import Settings, SettingsError, load_settings, setting_groups, unknown_variables

DESCRIPTION = "Serves one language model with any number of adapters on it, through the OpenAI API."
EPILOG = (
    "Each option is also a variable (--max-num-seqs: TIMBRE_MAX_NUM_SEQS) and a line of the TOML file given "
    "by --config (max_num_seqs = 64). A flag wins over a variable, a variable over the file."
)
FAILURE, USAGE_ERROR = 1, 2
METAVARS = {"tuple[tuple": "JSON", "int": "N", "float": "SECONDS", "Path": "PATH", "tuple": "LIST"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    if command == "version":
        print(version())
        return 0
    if command == "convert":
        return _convert(Conversion(**options))
    try:
        settings = load_settings(options)
    except SettingsError as error:
        print(f"timbre serve: these settings cannot be used\n{error}", file=sys.stderr)
        return USAGE_ERROR
    for name in unknown_variables():
        print(f"timbre serve: the variable {name} is set, but there is no such setting", file=sys.stderr)
    from timbre_server.launch import serve  # Slower to import than --help should be.

    return serve(settings, _say)


def _convert(wanted: Conversion) -> int:
    try:
        _say(convert(wanted))
    except ConversionError as error:
        print(f"timbre convert: {error}", file=sys.stderr)
        return FAILURE
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def version() -> str:
    """The installed distribution's version."""
    try:
        return metadata.version("timbre")
    except metadata.PackageNotFoundError:
        return "not installed: run from its sources"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timbre", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="start the server",
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="timbre serve [--model MODEL] [--port N] [options]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, names in setting_groups().items():
        group = serve.add_argument_group(title)
        for name in names:
            _add_option(group, name, Settings.model_fields[name])
    add_arguments(commands.add_parser("convert", help="make an adapter of a pickle", allow_abbrev=False))
    commands.add_parser("version", help="print the version")
    return parser


def _add_option(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    text = " ".join((field.description or "").split())
    if field.default not in (None, ()) and "(default" not in text:
        text += f" (default: {str(field.default).lower() if field.annotation is bool else field.default})"
    text = text.replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(flag, dest=name, help=text, action=argparse.BooleanOptionalAction)
    else:
        choices = _choices(field.annotation)
        group.add_argument(
            flag, dest=name, help=text, choices=choices, metavar=None if choices else _metavar(field)
        )


def _choices(annotation: object) -> tuple[str, ...] | None:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else None


def _metavar(field: FieldInfo) -> str:
    text = str(field.annotation)
    return next((metavar for kind, metavar in METAVARS.items() if kind in text), "TEXT")
