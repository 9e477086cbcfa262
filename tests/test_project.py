"""Holds the project's files: commands answer fast, the README stays short, the changelog is kept, versions have bounds."""

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_within_two_seconds(command: str) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{command}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        assert f"python -m launch.{command}" in done.stdout
    assert min(seconds) < 2, f"{command} --help takes {min(seconds):.1f} s: import jax and what needs it inside main"


def test_readme_is_short_and_names_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 250
    assert {"make quickstart", "make test"} <= {line.strip().removeprefix("$ ").partition("  #")[0] for line in lines}


def test_changelog_has_a_place_for_the_next_change() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_dependency_is_bounded_on_both_sides() -> None:
    extras = [one for many in PROJECT["optional-dependencies"].values() for one in many]
    for requirement in [*PROJECT["dependencies"], *extras]:
        if not requirement.startswith("monolith_jax["):
            assert re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+,<[\d.]+", requirement), requirement


def test_every_command_of_the_makefile_exists() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"-m launch\.(\w+)", text)
    files = re.findall(r"--gin_file=(\S+)", text)
    assert commands and files
    assert set(commands) <= set(COMMANDS)
    assert all((ROOT / file).is_file() for file in files)
