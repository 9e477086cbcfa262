"""The command line that every command shares. In: arguments. Out: gin files, overrides, run folder. Imports nothing heavy."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_GIN = "--gin."
_FLAGS = ("--gin_file", "--workdir", "--help")
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
    parser = argparse.ArgumentParser(
        prog=" ".join(example.split()[:3]),
        description=description,
        epilog=_OVERRIDES + f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s --gin_file=PATH [--gin_file=PATH ...] [--gin.NAME=VALUE ...] --workdir=FOLDER",
    )
    parser.add_argument("--gin_file", action="append", required=True, metavar="PATH", help="a gin file; later ones win")
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER", help="the run folder; made when missing")
    known, unknown = parser.parse_known_args(argv)
    overrides = [_override(parser, argument) for argument in unknown if argument.startswith(_GIN)]
    for argument in unknown:
        if not argument.startswith(_GIN):
            parser.error(_unknown(argument))
    return Arguments(known.gin_file, overrides, known.workdir)


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


def _unknown(argument: str) -> str:
    flag = argument.partition("=")[0]
    if "." in flag or not flag.startswith("-"):
        return f"unknown argument {argument}; a binding is written {_GIN}{flag.lstrip('-')}=VALUE"
    closest = difflib.get_close_matches(flag, _FLAGS, n=1, cutoff=0.0)[0]
    return f"unknown flag {flag}; the nearest is {closest}"
