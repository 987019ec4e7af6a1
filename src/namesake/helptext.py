"""``--help`` and what typer says of a wrong command line, in the user's language."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import typer

from namesake import messages
from namesake.messages import tr, translated

_UsageError: Any = typer.BadParameter.__base__


def run(app: typer.Typer, name: str | None = None) -> None:
    """Run the app on the command line; it ends with ``SystemExit``, or with the error that a command raised."""
    made = command(app)
    if messages.language() == "en":
        made(prog_name=name)
    try:
        sys.exit(made(prog_name=name, standalone_mode=False))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            print(_told(error), file=sys.stderr)
        sys.exit(error.exit_code)


def command(app: typer.Typer) -> Any:
    """The app as a command whose help is in the user's language."""
    messages.install()
    made: Any = typer.main.get_command(app)
    if messages.language() != "en":
        _translate(made)
    return made


def _translate(one: Any) -> None:
    one.help = translated(one.help or "")
    one.format_usage = partial(_usage, one)  # the one word of the help that typer does not ask gettext for
    for parameter in one.get_params(typer.Context(one)):
        parameter.help = translated(getattr(parameter, "help", None) or "")
    for below in getattr(one, "commands", {}).values():
        _translate(below)


def _usage(one: Any, context: Any, formatter: Any) -> None:
    pieces = " ".join(one.collect_usage_pieces(context))
    formatter.write_usage(context.command_path, pieces, translated(tr("Usage: ")))


def _told(error: Any) -> str:
    """A wrong command line, as typer's ``UsageError.show`` tells it."""
    lines = []
    if error.ctx is not None:
        hint = tr("Try '{command} --help' for help.", command=error.ctx.command_path)
        lines += [error.ctx.get_usage(), translated(hint), ""]
    kind, text = type(error).__name__, error.format_message()
    if kind == "NoSuchOption":
        text = tr("No such option: {option}", option=error.option_name)
        if error.possibilities:
            text = tr("{fault} (did you mean {close}?)", fault=text, close=", ".join(sorted(error.possibilities)))
    elif kind == "MissingParameter":
        text = tr("Missing parameter: {name}", name=error.param.get_error_hint())
    elif kind == "BadParameter" and error.param is None:
        text = error.message
    elif kind == "BadParameter":
        text = tr("Invalid value for {name}: {fault}", name=error.param.get_error_hint(), fault=error.message)
    return "\n".join([*lines, translated(tr("error: {message}", message=text))])
