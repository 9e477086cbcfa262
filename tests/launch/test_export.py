"""An exported folder: it serves what was published at the same step, Orbax alone reads it, and bad input is refused."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launch import export as command
from launch.bench import kill
from launch.export import export
from launch.readers import make_memories, open_source
from launch.run import train
from monolith_jax.experiment import load
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.stream.synthetic import SyntheticConfig
from monolith_jax.sync.delta import DeltaFolder
from tests.test_flow import ROOT, SMALL, STEPS

# What an export is for: nothing but these two is there.
ALONE = """
import json, sys, pathlib, numpy, orbax.checkpoint
assert not any(name.startswith("monolith_jax") for name in sys.modules)
folder, into = map(pathlib.Path, sys.argv[1:])
read = orbax.checkpoint.PyTreeCheckpointer().restore
told = {}
for table in (folder / "tables").iterdir():
    for block in table.iterdir():
        tree = read(block)
        told[f"{table.name} ids"], told[f"{table.name} vectors"] = tree["ids"], tree["vectors"]

def walk(tree, path):
    for name, leaf in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(leaf, (dict, list)):
            walk(leaf, [*path, str(name)])
        else:
            told["dense " + "/".join([*path, str(name)])] = numpy.asarray(leaf)

walk(read(folder / "dense"), [])
numpy.savez(into, **{name.replace("/", "|"): array for name, array in told.items()})
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that also published, ids that expire and a table of bfloat16 among it."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        f"TrainConfig.steps = {STEPS}", "user/TableConfig.dtype = 'bfloat16'", "user/TableConfig.dim = 7",
        "Experiment.publisher = @PublisherConfig()", "PublisherConfig.format = 'float32'", "SnapshotConfig.period_steps = 20",
        "PublisherConfig.period_s = 0.0", "PublisherConfig.dense_period_s = 1000.0",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(load(["configs/quickstart.gin"], [*SMALL, *overrides]), folder, Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def exported(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export(workdir, folder, "float32").step == STEPS
    return folder


def serve(root: Path, config: Path) -> ServedModel:
    experiment = load([config])
    parts = (experiment.features, experiment.tables, experiment.model, experiment.heads)
    return ServedModel(root, *parts, num_shards=experiment.mesh.num_shards, batch_sizes=(64,))


def test_it_serves_what_was_published(workdir: Path, exported: Path) -> None:
    # No more than the folder is needed; the deltas of the run are only compared with.
    published, served = serve(workdir / "deltas", workdir / "config.gin"), serve(exported, exported / "config.gin")
    assert served.step == published.step == STEPS
    assert (served.event_time_ms, served.position) == (published.event_time_ms, published.position)
    counts = served.metrics()["rows_of_tables"]
    assert counts == published.metrics()["rows_of_tables"] and sum(counts.values()) == kill_rows(workdir)
    folder = DeltaFolder(exported)
    for table, rows in folder.read(folder.versions()[-1]).rows.items():
        assert rows.ids.size == np.unique(rows.ids).size == counts[table]
        (got, found), (wanted, known) = served.vectors(table, rows.ids), published.vectors(table, rows.ids)
        assert found.all() and known.all()
        np.testing.assert_array_equal(got, wanted)
    assert counts["user"] and counts["video"]
    experiment = load([exported / "config.gin"])
    assert isinstance(experiment.source, SyntheticConfig)
    examples = next(iter(open_source(experiment.source).read({}))).examples.slice(0, 100)
    for memory in make_memories(experiment):
        examples = memory.extend(examples)
    np.testing.assert_array_equal(served.predict(examples), published.predict(examples))


def kill_rows(workdir: Path) -> int:
    return next(row["rows"] for row in kill.rows_of(workdir) if row["kind"] == "summary")


def test_orbax_alone_reads_it(exported: Path, tmp_path: Path) -> None:
    into = tmp_path / "read.npz"
    subprocess.run([sys.executable, "-c", ALONE, str(exported / "orbax"), str(into)], cwd=tmp_path, check=True)
    read = {name.replace("|", "/"): array for name, array in np.load(into).items()}
    folder = DeltaFolder(exported)
    content = folder.read(folder.versions()[-1])
    assert content.dense is not None
    assert {name for name in read if name.startswith("dense ")} == {f"dense {name}" for name in content.dense}
    for name, weight in content.dense.items():
        np.testing.assert_array_equal(read[f"dense {name}"], weight)
    assert {name for name in read if name.endswith(" ids")} == {f"{name} ids" for name in content.rows}
    for name, rows in content.rows.items():
        assert read[f"{name} ids"].dtype == np.int64 and read[f"{name} vectors"].dtype == np.float32
        np.testing.assert_array_equal(read[f"{name} ids"], rows.ids)
        np.testing.assert_array_equal(read[f"{name} vectors"], rows.vectors)


def test_a_later_export_is_a_later_base(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "model"
    flags = [f"--workdir={workdir}", f"--output={output}"]
    assert command.main([*flags, "--format=int8", "--step=20"]) == 0
    served = serve(output, output / "config.gin")
    assert (served.step, served.version.epoch) == (20, 1)
    assert command.main(flags) == 0 and "step 30" in capsys.readouterr().out
    assert served.poll() == 1 and (served.step, served.version.epoch) == (STEPS, 2)
    manifest = DeltaFolder(output).manifest(served.version)
    assert manifest.format == "float16" and "TrainConfig" in manifest.config
    assert {child.name for child in output.iterdir()} <= {
        "config.gin",
        "orbax",
        "readers",
        "00000001-0000000000",
        "00000002-0000000000",
    }


def test_bad_input_is_refused(workdir: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new"

    def refused(*flags: str) -> str:
        assert command.main([f"--workdir={workdir}", f"--output={new}", *flags]) == 1
        assert not new.exists()
        return capsys.readouterr().err

    assert "no snapshot in" in refused(f"--workdir={tmp_path}")
    assert "no snapshot of step 7" in (said := refused("--step=7")) and "20, 30" in said
    assert "there is no format 'fp8'" in (said := refused("--format=fp8")) and "float16" in said
    assert "give the run folder as --workdir" in refused(f"--workdir={workdir / 'snapshots'}")
    assert "is a run folder" in refused(f"--output={workdir}")
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("")
    assert "holds something else than an export (precious)" in refused(f"--output={other}")
    assert "is a file" in refused(f"--output={other / 'precious'}")
    (other / "precious").unlink()
    text = (exported / "config.gin").read_text()
    assert "MMoEConfig.num_experts = 2" in text
    (other / "config.gin").write_text(text.replace("MMoEConfig.num_experts = 2", "MMoEConfig.num_experts = 3"))
    assert "holds another model" in (said := refused(f"--output={other}")) and "differ in model.num_experts" in said
    assert [child.name for child in other.iterdir()] == ["config.gin"]


def test_a_configuration_of_another_run_is_refused(workdir: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshots").symlink_to(workdir / "snapshots")
    text = (workdir / "config.gin").read_text()
    (tmp_path / "config.gin").write_text(text.replace("MMoEConfig.num_experts = 2", "MMoEConfig.num_experts = 3"))
    with pytest.raises(ValueError, match=r"is of another run than the snapshot of step 30:\n  model.num_experts"):
        export(tmp_path, tmp_path / "out")


def test_larger_tables_wait_for_the_next_snapshot(workdir: Path, exported: Path, tmp_path: Path) -> None:
    # A run that was started again with more rows, and ended before it saved.
    (tmp_path / "snapshots").symlink_to(workdir / "snapshots")
    text = (workdir / "config.gin").read_text()
    assert "video/TableConfig.max_rows = 1000" in text
    (tmp_path / "config.gin").write_text(text.replace("video/TableConfig.max_rows = 1000", "video/TableConfig.max_rows = 3000"))
    done = export(tmp_path, tmp_path / "out", "float32")
    one, other = DeltaFolder(exported), DeltaFolder(tmp_path / "out")
    content, wanted = other.read(done.version), one.read(one.versions()[-1])
    for name, rows in wanted.rows.items():
        np.testing.assert_array_equal(content.rows[name].ids, rows.ids)
        np.testing.assert_array_equal(content.rows[name].vectors, rows.vectors)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert command.EXAMPLE in capsys.readouterr().out
