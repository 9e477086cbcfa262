"""Writes `configs/reference.gin`: every config that a file may bind, with the type, default and meaning of each field."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from pathlib import Path

PATH = Path(__file__).parent.parent / "configs" / "reference.gin"
_HEADER = """\
# Every name that a gin file or --gin.NAME=VALUE may bind: its meaning, type and default. A name without a default is required.
# Generated from the dataclasses by `python -m launch.reference`; to read and to copy from, not to include.
"""


def reference() -> str:
    """Returns the text of `configs/reference.gin`."""
    from monolith_jax.experiment import CONFIGS, Experiment

    return "\n".join([_HEADER, *(describe_config(config) for config in (Experiment, *CONFIGS))])


def describe_config(config: type) -> str:
    """Returns the part of the reference that tells of one dataclass."""
    from monolith_jax.config_tree import describe

    hints, docs = typing.get_type_hints(config), field_docs(config)
    lines = ["# " + "-" * 125, f"# {config.__name__} ({config.__module__})"]
    lines += _commented(inspect.getdoc(config) or "")
    for field in dataclasses.fields(config):
        if field.init:
            lines += ["#", *_commented(f"{docs.get(field.name, '')} ({describe(hints[field.name])})".strip())]
            name, default = f"{config.__name__}.{field.name}", _default(field)
            lines.append(f"{name} = {default}" if default else f"# {name} =")
    return "\n".join(lines) + "\n"


def field_docs(config: type) -> dict[str, str]:
    """Returns the string under each field of a dataclass, white space made single. A field without one is left out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[field.target.id] = " ".join(text.split())
    return docs


def _default(field: dataclasses.Field) -> str:
    """Returns the default as a file would say it, or nothing where there is none."""
    from monolith_jax.config_tree import value_text

    if field.default is not dataclasses.MISSING:
        return value_text(field.default, {})
    return value_text(field.default_factory(), {}) if field.default_factory is not dataclasses.MISSING else ""


def _commented(text: str) -> list[str]:
    lines = [line for part in text.split("\n") for line in (textwrap.wrap(part, 120) or [""])]
    return [f"#   {line}".rstrip() for line in lines]


def main(argv: list[str] | None = None) -> int:
    """Writes the file, or with `--check` tells whether it is current. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is not current")
    check = parser.parse_args(argv).check
    text = reference()
    if not check:
        PATH.write_text(text, encoding="utf-8")
        print(f"wrote {PATH}")
        return 0
    if PATH.is_file() and PATH.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PATH} is not current: run `python -m launch.reference`")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
