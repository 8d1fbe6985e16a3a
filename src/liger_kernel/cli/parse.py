"""From the signature of a command to its parser: typer's, or argparse's where typer is not installed.

A parameter is `name: Annotated[type, "help"]`: an argument if it has no default, or is `Annotated[type, "help",
ARGUMENT]`, else an option. Types are str, int, bool (a flag), list[str] (an option that may be repeated), and these
`| None`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

from liger_kernel.cli.answer import UserError

PROG = "liger_kernel"
#: marks an argument that may be left out
ARGUMENT = object()
HELP = (
    "Fused kernels for training large language models: what is here, what they do, and what is wrong."
    "\n\n--version prints the version."
)
_JSON = "Print JSON."

Command = Callable[..., Any]
#: name of the command, its arguments, and whether JSON is wanted
Parsed = tuple[str, dict[str, Any], bool]


@dataclass(frozen=True)
class Parameter:
    name: str
    type: Any
    help: str
    default: Any
    is_argument: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def parameters(command: Command) -> list[Parameter]:
    hints = get_type_hints(command, include_extras=True)
    found = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, text, *marks = get_args(hints[name])
        is_argument = parameter.default is inspect.Parameter.empty or ARGUMENT in marks
        found.append(Parameter(name, kind, text, parameter.default, is_argument))
    json = Parameter("json", bool, _JSON, False, False)
    return [*found, json]


def parse(commands: dict[str, Command], argv: Sequence[str]) -> Parsed | None:
    """What is asked for; None if it was help, which is printed then.

    Raises: UserError for arguments that fit no command.
    """
    parser = _by_typer if _has_typer() else _by_argparse
    try:
        parsed = parser(commands, list(argv) or ["--help"])
    except UserError as error:
        command = " ".join([PROG, *(name for name in argv[:1] if name in commands)])
        raise UserError(f"{str(error).rstrip('.')}. Try: {command} --help") from error
    if parsed is None:
        return None
    name, given = parsed
    return name, given, given.pop("json")


def _has_typer() -> bool:
    try:
        import typer  # noqa: F401
    except ImportError:
        return False
    return True


def _by_typer(commands: dict[str, Command], argv: list[str]) -> tuple[str, dict[str, Any]] | None:
    import typer

    app = typer.Typer(
        help=HELP, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )

    @app.callback()
    def several() -> None:
        """Without a callback, typer makes an app of one command that has no name."""

    for name, command in commands.items():
        app.command(name, help=command.__doc__)(_for_typer(name, command))
    errors: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        parsed = app(argv, prog_name=PROG, standalone_mode=False)
    except errors as error:
        raise UserError(error.format_message()) from error
    return parsed if isinstance(parsed, tuple) else None


def _for_typer(name: str, command: Command) -> Command:
    import typer

    def parsed(**given: Any) -> tuple[str, dict[str, Any]]:
        return name, given

    made = []
    for p in parameters(command):
        kind: dict[str, Any] = {}
        if p.type is int:
            kind = {"parser": _whole_number, "metavar": "INTEGER"}
        how = (
            typer.Argument(help=p.help, **kind)
            if p.is_argument
            else typer.Option(p.flag, help=p.help, **kind)
        )
        made.append(
            inspect.Parameter(
                p.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=Annotated[p.type, how],
                default=p.default,
            )
        )
    vars(parsed)["__signature__"] = inspect.Signature(made)
    parsed.__annotations__ = {p.name: p.annotation for p in made}
    return parsed


def _whole_number(text: str | int) -> int:
    """An int; its error names what was given, which that of newer releases of typer does not."""
    import typer

    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no whole number") from error


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})  # as typer has it

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}")


def _by_argparse(
    commands: dict[str, Command], argv: list[str]
) -> tuple[str, dict[str, Any]] | None:
    parser = _Parser(PROG, description=HELP)
    choice = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        text = (command.__doc__ or "").strip()
        one = choice.add_parser(name, help=text.splitlines()[0], description=text)
        for p in parameters(command):
            one.add_argument(p.name if p.is_argument else p.flag, help=p.help, **_how(p))
    try:
        given = vars(parser.parse_args(argv))
    except SystemExit:  # after --help
        sys.stdout.flush()
        return None
    return given.pop("command"), given


def _how(p: Parameter) -> dict[str, Any]:
    if p.type is bool:
        return {"action": "store_true"}
    kinds = [t for t in get_args(p.type) if t is not type(None)]
    kind = kinds[0] if get_origin(p.type) is UnionType else p.type
    how: dict[str, Any] = {"type": kind}
    if get_origin(kind) is list:
        how = {"type": get_args(kind)[0], "action": "append"}
    if p.default is not inspect.Parameter.empty:
        how |= {"default": p.default, **({"nargs": "?"} if p.is_argument else {})}
    return how
