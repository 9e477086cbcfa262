"""The command line that every command shares. In: arguments. Out: gin files, overrides, run folder. Imports nothing heavy."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_GIN = "--gin."
_GIN_USAGE = "%(prog)s --gin_file=PATH [--gin_file=PATH ...] [--gin.NAME=VALUE ...] "
_OVERRIDES = """\
overrides, over what the files say:
  --gin.TrainConfig.steps=100     one field
  --gin.user/TableConfig.dim=8    one field of the config built in scope `user`
  --gin.DATA=/data                the macro %DATA
A bare word is text and needs no quotes. Every name, type and default stands in configs/reference.gin.

"""


class Arguments(NamedTuple):
    """What was asked for."""

    gin_files: list[str]
    """Paths, in the order given."""
    overrides: list[str]
    """Bindings as text, in the order given: `TrainConfig.steps = 100`."""
    workdir: Path
    """The run folder."""


def parse(argv: Sequence[str] | None, description: str, example: str) -> Arguments:
    """Reads a command line; prints help or an error and exits where argparse would.

    Args:
      argv: The arguments, None for those of the process.
      description: What the command does, a sentence.
      example: A full command line that works, starting with `python -m module`.

    Returns:
      The gin files, the overrides and the run folder.
    """
    parser = gin_parser(description, example, "--workdir=FOLDER")
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER", help="the run folder; made when missing")
    known, overrides = parse_gin(parser, argv, ("--gin_file", "--workdir", "--help"))
    return Arguments(known.gin_file, overrides, known.workdir)


def gin_parser(description: str, example: str, usage: str) -> argparse.ArgumentParser:
    """Returns a parser of a command that reads gin files; `usage` names its further flags, which the caller adds."""
    parser = argparse.ArgumentParser(
        prog=" ".join(example.split()[:3]),
        description=description,
        epilog=_OVERRIDES + f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=_GIN_USAGE + usage,
    )
    parser.add_argument("--gin_file", action="append", required=True, metavar="PATH", help="a gin file; later ones win")
    return parser


def parse_gin(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, flags: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Returns what the parser found, and the overrides; exits where it would. `flags`: all of its flags."""
    known, unknown = parser.parse_known_args(argv)
    overrides = [_override(parser, argument) for argument in unknown if argument.startswith(_GIN)]
    for argument in unknown:
        if not argument.startswith(_GIN):
            parser.error(_unknown(argument, flags))
    return known, overrides


def _override(parser: argparse.ArgumentParser, argument: str) -> str:
    name, equals, value = argument.removeprefix(_GIN).partition("=")
    if not equals or not name:
        parser.error(f"{argument}: expected {_GIN}NAME=VALUE, in one word")
    return f"{name} = {_quoted(value)}"


def _quoted(value: str) -> str:
    """Returns `value` as gin reads it: a literal, a reference, a macro or a container as it stands, anything else as text."""
    if value.startswith(("@", "%", "(", "[", "{", "'", '"')):
        return value
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return repr(value)
    return value


def _unknown(argument: str, flags: Sequence[str]) -> str:
    flag = argument.partition("=")[0]
    if "." in flag or not flag.startswith("-"):
        return f"unknown argument {argument}; a binding is written {_GIN}{flag.lstrip('-')}=VALUE"
    closest = difflib.get_close_matches(flag, flags, n=1, cutoff=0.0)[0]
    return f"unknown flag {flag}; the nearest is {closest}"
