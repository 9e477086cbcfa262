"""The command that plans: its last line, its exit status, how soon it helps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plan import in_words, main

ROOT = Path(__file__).parent.parent
GIN = f"--gin_file={ROOT / 'configs' / 'quickstart.gin'}"


def test_last_line_is_json_and_the_tables_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([GIN, "--devices=8", "--hosts=2"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert (found["fits"], found["num_devices"], found["num_hosts"]) == (True, 8, 2)
    parts = {name: size for name, size in found["device"].items() if name != "total"}
    assert found["device"]["total"] == sum(parts.values())
    assert [table["name"] for table in found["tables"]][:2] == ["user", "video"]
    for size in (*parts.values(), found["host"]["maps"], found["written"], found["zipf"]["to_batch"]):
        assert in_words(size) in text


def test_what_cannot_fit_ends_with_1_and_names_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([GIN, "--devices=4", "--gin.video/TableConfig.max_rows=2000000000"])
    out, err = capsys.readouterr()
    assert status == 1
    assert err.startswith("ValueError: a device would need 98.") and "'video'" in err and "--devices=8" in err
    assert json.loads(out.splitlines()[-1])["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--devices=4", "--host_memory_gb=0.05"], "a host would need"),
        (["--devices=48"], "48 devices do not divide MeshConfig.num_shards = 64"),
        (["--devices=4", "--gin.video/TableConfig.max_rows=9000000000"], "raise MeshConfig.num_shards"),
        (["--gin.TableConfig.dmi=9"], "dmi"),
    ],
)
def test_what_is_wrong_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([GIN, *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_wrong_flag_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([GIN, "--device=4"])
    assert "unknown flag --device; the nearest is --devices" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "train"])
def test_help_starts_neither_jax_nor_numpy(command: str) -> None:
    code = (
        f"import sys, launch.{command} as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'numpy', 'rich', 'gin'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m launch.{command} --gin_file=" in done.stdout


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2.5e9, "2.50 GB"), (1.234e15, "1234.00 TB")]
)
def test_bytes_in_words(size: float, text: str) -> None:
    assert in_words(size) == text
