"""Holds the gin files: each loads with the command in its header, includes come first, the reference is current."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from launch import cli, reference
from monolith_jax import experiment

ROOT = Path(__file__).parent.parent
RUNNABLE = sorted(path for path in (ROOT / "configs").glob("*.gin") if path != reference.PATH)
ALL = sorted(path for path in (ROOT / "configs").rglob("*.gin") if path != reference.PATH)


def header_command(path: Path) -> list[str]:
    """Returns the arguments of the command in a file's opening comment, its continued lines joined."""
    opening = path.read_text(encoding="utf-8").partition("\n\n")[0]
    text = "\n".join(line.removeprefix("#").strip() for line in opening.splitlines() if line.startswith("#"))
    found = re.search(r"python -m launch\.\w+ (.*)", text.replace("\\\n", " "))
    assert found, f"{path}: the opening comment gives no command, `python -m launch.train --gin_file=... --workdir=...`"
    return shlex.split(found[1])


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_file_loads_with_its_own_command_and_reruns_from_its_text(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = cli.parse(header_command(path), "", "python -m launch.train")
    assert Path(arguments.gin_files[-1]).resolve() == path, "the command runs another file"
    loaded = experiment.load(arguments.gin_files, arguments.overrides)
    (tmp_path / "config.gin").write_text(experiment.to_gin(loaded))
    assert experiment.load([tmp_path / "config.gin"]) == loaded


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_includes_come_first_and_name_files_from_the_root(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    includes = [line.startswith("include ") for line in lines]
    assert includes == sorted(includes, reverse=True)
    for line, include in zip(lines, includes, strict=True):
        assert not include or (ROOT / ast.literal_eval(line.removeprefix("include ").strip())).is_file(), line


def test_reference_is_current() -> None:
    assert reference.PATH.read_text(encoding="utf-8") == reference.reference(), "run `python -m launch.reference`"


def test_reference_tells_name_type_default_and_meaning() -> None:
    @dataclasses.dataclass(frozen=True)
    class SampleConfig:
        """Samples."""

        rate: "float"
        """Draws
        a second."""
        names: "tuple[str, ...]" = ("a",)

    text = reference.describe_config(SampleConfig)
    assert "#   Draws a second. (float)\n# SampleConfig.rate =\n" in text
    assert "#   (tuple[str, ...])\nSampleConfig.names = ('a',)\n" in text


@pytest.mark.parametrize("config", (experiment.Experiment, *experiment.CONFIGS), ids=lambda config: config.__name__)
def test_config_is_frozen_named_and_documented(config: type) -> None:
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    assert config is experiment.Experiment or config.__name__.endswith("Config")
    bare = {field.name for field in dataclasses.fields(config) if field.init} - reference.field_docs(config).keys()
    assert not bare, f"{config.__name__}: no string under {bare}"


def test_every_config_of_the_package_is_listed() -> None:
    listed = {config.__name__ for config in experiment.CONFIGS}
    for path in sorted((ROOT / "monolith_jax").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                assert node.name in listed, f"{path}: {node.name} is not in experiment.CONFIGS"
