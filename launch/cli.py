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
_FLAGS = ("--gin_file", "--workdir", "--help")
_PROCESS_FLAGS = ("--coordinator", "--num_processes", "--process_id", "--join_timeout_s")
_OVERRIDES = """\
overrides, over what the files say:
  --gin.TrainConfig.steps=100     one field
  --gin.user/TableConfig.dim=8    one field of the config built in scope `user`
  --gin.DATA=/data                the macro %DATA
A bare word is text and needs no quotes. Every name, type and default stands in configs/reference.gin.

"""


class ProcessFlags(NamedTuple):
    """Which processes form the run, as far as the command line says; `launch.members` reads the rest."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """All processes of the run."""
    process_id: int | None = None
    """This one's, from 0."""
    join_timeout_s: int = 300
    """How long to wait for all processes."""


class Arguments(NamedTuple):
    """What was asked for."""

    gin_files: list[str]
    """Paths, in the order given."""
    overrides: list[str]
    """Bindings as text, in the order given: `TrainConfig.steps = 100`."""
    workdir: Path
    """The run folder."""
    processes: ProcessFlags = ProcessFlags()
    """Given only to commands that run as several processes."""


def parse(argv: Sequence[str] | None, description: str, example: str, several: bool = False) -> Arguments:
    """Reads a command line; prints help or an error and exits where argparse would.

    Args:
      argv: The arguments, None for those of the process.
      description: What the command does, a sentence.
      example: A full command line that works, starting with `python -m module`.
      several: Whether the command may run as several processes, and takes the flags of `ProcessFlags`.

    Returns:
      The gin files, the overrides, the run folder and what was said of processes.
    """
    parser = gin_parser(description, example, "--workdir=FOLDER")
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER", help="the run folder; made when missing")
    if several:
        _add_processes(parser)
    known, overrides = parse_gin(parser, argv, (*_FLAGS, *_PROCESS_FLAGS) if several else _FLAGS)
    processes = ProcessFlags(*(getattr(known, name) for name in ProcessFlags._fields)) if several else ProcessFlags()
    return Arguments(known.gin_file, overrides, known.workdir, processes)


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


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes", "not needed under SLURM's srun and Open MPI 4; see launch/cluster/")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="host of process 0, and a free port there")
    group.add_argument("--num_processes", type=int, metavar="N", help="all processes of the run")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, 0 to N - 1")
    group.add_argument("--join_timeout_s", type=int, metavar="S", default=300, help="wait so long for all (%(default)s)")


def _override(parser: argparse.ArgumentParser, argument: str) -> str:
    name, equals, value = argument.removeprefix(_GIN).partition("=")
    if not equals or not name:
        parser.error(f"{argument}: expected {_GIN}NAME=VALUE, in one word")
    return f"{name} = {gin_value(value)}"


def gin_value(value: str) -> str:
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
