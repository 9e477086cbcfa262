"""The command line: what becomes of each argument, and what a wrong one is told."""

from pathlib import Path

import pytest

from launch.cli import ProcessFlags, parse

EXAMPLE = "python -m launch.train --gin_file=configs/quickstart.gin --workdir=checkpoints/quickstart"
NEEDED = ["--gin_file=a.gin", "--workdir=run"]


def test_files_overrides_and_folder_keep_their_order() -> None:
    found = parse(["--gin_file=a.gin", "--gin.B.c=1", "--gin_file", "b.gin", "--gin.D=2", "--workdir", "run"], "", EXAMPLE)
    assert found == (["a.gin", "b.gin"], ["B.c = 1", "D = 2"], Path("run"), ProcessFlags())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("100", "100"),
        ("-1e-3", "-1e-3"),
        ("True", "True"),
        ("None", "None"),
        ("(1, 'a')", "(1, 'a')"),
        ("(%A, @B())", "(%A, @B())"),
        ("%A", "%A"),
        ("@user/B()", "@user/B()"),
        ("'quoted'", "'quoted'"),
        ("foo", "'foo'"),
        ("/data/a b", "'/data/a b'"),
        ("a=b", "'a=b'"),
        ("2024-01-02", "'2024-01-02'"),
        ("it's", '"it\'s"'),
        ("", "''"),
    ],
)
def test_bare_words_are_quoted(value: str, text: str) -> None:
    found = parse([*NEEDED, f"--gin.user/TableConfig.name={value}"], "", EXAMPLE)
    assert found.overrides == [f"user/TableConfig.name = {text}"]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--workdri=x", "unknown flag --workdri; the nearest is --workdir"),
        ("--gin_files=x", "unknown flag --gin_files; the nearest is --gin_file"),
        ("--TrainConfig.steps=1", "a binding is written --gin.TrainConfig.steps=VALUE"),
        ("TrainConfig.steps=1", "a binding is written --gin.TrainConfig.steps=VALUE"),
        ("--gin.TrainConfig.steps", "expected --gin.NAME=VALUE, in one word"),
        ("--gin.=1", "expected --gin.NAME=VALUE, in one word"),
    ],
)
def test_wrong_arguments_are_refused(argument: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([*NEEDED, argument], "", EXAMPLE)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 1])
def test_both_flags_are_needed(left: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([NEEDED[left]], "", EXAMPLE)
    assert "required" in capsys.readouterr().err


def test_help_shows_the_example_and_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], "Trains a model.", EXAMPLE)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith("usage: python -m launch.train --gin_file=PATH")
    assert all(part in text for part in ("Trains a model.", EXAMPLE, "--gin.user/TableConfig.dim=8"))


def test_flags_of_processes_are_for_commands_that_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--coordinator=a:1", "--num_processes=4", "--process_id=3", "--join_timeout_s=9"]
    assert parse([*NEEDED, *given], "", EXAMPLE, several=True).processes == ProcessFlags("a:1", 4, 3, 9)
    assert parse(NEEDED, "", EXAMPLE, several=True).processes == ProcessFlags(None, None, None, 300)
    with pytest.raises(SystemExit):
        parse([*NEEDED, *given], "", EXAMPLE)
    assert "unknown flag --coordinator" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([*NEEDED, "--proces_id=0"], "", EXAMPLE, several=True)
    assert "the nearest is --process_id" in capsys.readouterr().err
