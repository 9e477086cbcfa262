"""What a sweep's file means: its points, their bindings, and what is refused before anything runs."""

from pathlib import Path

import pytest

from launch import sweep
from launch.points.train import TrainPoint
from launch.sweeps.config import AxisConfig, Sweep, check_points, divided, load_sweep, make_points
from monolith_jax.models.deepfm import DeepFMConfig
from tests.launch.small_sweep import ROOT, write_sweep

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.gin"))


@pytest.fixture(autouse=True)
def from_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_points_are_the_product_of_axes_and_seeds() -> None:
    rate = AxisConfig(name="rate", labels=("a", "b"), bind=("dense/OptimizerConfig.learning_rate",), values=((0.1,), (0.2,)))
    size = AxisConfig(name="size", labels=("1", "2"), gin_files=("x.gin", "y.gin"))
    made = make_points(Sweep(name="s", gin_files=("f.gin",), axes=(rate, size), seeds=(3, 5)))
    assert [tuple(point.labels.values()) for point in made[:4]] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert [point.base.seed for point in made] == [3] * 4 + [5] * 4 and [point.index for point in made] == list(range(8))
    assert made[1].base.gin_files == ("f.gin", "y.gin") and len({point.key for point in made}) == 8


def test_several_bindings_change_together_and_later_ones_win() -> None:
    both = AxisConfig(
        name="both", labels=("p", "q"), bind=("TrainConfig.batch_size", "TrainPoint.keep"), values=((64, True), (128, False))
    )
    plan = Sweep(name="s", gin_files=("configs/quickstart.gin",), bindings=("TrainConfig.steps = 8",), axes=(both,))
    one, other = make_points(plan, ["TrainConfig.steps = 7"])
    assert one.overrides == ("TrainPoint.keep = True",) and other.overrides == ("TrainPoint.keep = False",)
    assert (one.base.load().train.batch_size, other.base.load().train.batch_size) == (64, 128)
    assert one.base.load().train.steps == 7 and one.base.load("TrainConfig.steps = 9").train.steps == 9


def test_what_an_axis_sets_cannot_be_set_beside_it() -> None:
    rate = AxisConfig(name="rate", labels=("a",), bind=("dense/OptimizerConfig.learning_rate",), values=((0.1,),))
    plan = Sweep(name="s", gin_files=("configs/quickstart.gin",), axes=(rate,))
    with pytest.raises(ValueError, match=r"learning_rate is set by axis rate, so that .* would change nothing"):
        make_points(plan, ["dense/OptimizerConfig.learning_rate = 0.9"])
    with pytest.raises(ValueError, match=r"TrainConfig\.seed is set by Sweep\.seed_bindings"):
        make_points(plan, ["TrainConfig.seed = 3"])


def test_text_is_text_unless_gin_says_otherwise() -> None:
    bind = ("TrainConfig.warm_start", "DeepFMConfig.hidden", "Experiment.model")
    axis = AxisConfig(name="x", labels=("1",), bind=bind, values=(("a run", "(8, 4)", "@DeepFMConfig()"),))
    (point,) = make_points(Sweep(name="s", gin_files=("configs/movielens.gin",), axes=(axis,)))
    loaded = point.base.load()
    assert isinstance(loaded.model, DeepFMConfig) and loaded.model.hidden == (8, 4) and loaded.train.warm_start == "a run"


def test_seeds_go_where_the_sweep_says() -> None:
    names = ("TrainConfig.seed", "SyntheticConfig.seed")
    made = make_points(Sweep(name="s", gin_files=("configs/quickstart.gin",), seeds=(4,), seed_bindings=names))
    experiment = made[0].base.load()
    assert experiment.train.seed == experiment.source.seed == 4  # pyright: ignore[reportAttributeAccessIssue]


def test_overrides_of_the_sweep_and_of_its_experiments() -> None:
    of_sweep = ["Sweep.seeds = (1,)", "rate/AxisConfig.labels = ('a',)", "TrainPoint.keep = True"]
    of_experiment = ["TrainConfig.steps = 1", "user/TableConfig.dim = 4", "DATA = '/x'"]
    assert divided([*of_sweep, *of_experiment]) == (of_sweep, of_experiment)


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ({"labels": ()}, "has no labels"),
        ({"labels": ("a", "a"), "bind": ("A.b",), "values": ((1,), (2,))}, "labels must differ, got a, a"),
        ({"labels": ("a",)}, "sets nothing"),
        ({"labels": ("a", "b"), "bind": ("A.b",), "values": ((1,),)}, "2 labels and 1 values"),
        ({"labels": ("a",), "bind": ("A.b", "A.c"), "values": ((1,),)}, "are not one for each of bind"),
        ({"labels": ("a", "b"), "gin_files": ("x",)}, "2 labels and 1 gin_files"),
    ],
)
def test_an_axis_that_does_not_fit_is_refused(axis: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AxisConfig(name="x", **axis)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": ()}, "Sweep.seeds"),
        ({"seeds": (1, 1)}, "Sweep.seeds"),
        ({"baseline": "x=c"}, r"Sweep.baseline is 'x=c'; expected one of x=a, x=b"),
        ({"cores": 0}, "Sweep.cores must be above 0"),
        ({"memory_gb": -1.0}, "Sweep.memory_gb"),
        ({"workers": -1}, "Sweep.workers"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(changed: dict, said: str) -> None:
    axis = AxisConfig(name="x", labels=("a", "b"), gin_files=("1", "2"))
    with pytest.raises(ValueError, match=said):
        Sweep(name="s", gin_files=(), axes=(axis,), **changed)
    with pytest.raises(ValueError, match="different names"):
        Sweep(name="s", gin_files=(), axes=(axis, axis))
    with pytest.raises(ValueError, match="seed is a column"):
        Sweep(name="s", gin_files=(), axes=(AxisConfig(name="seed", labels=("a",), gin_files=("1",)),))


def test_a_wrong_binding_is_found_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path)
    argv = [f"--gin_file={file}", f"--workdir={tmp_path / 'out'}"]
    assert sweep.main([*argv, "--gin.TrainConfig.step=3"]) == 1
    said = capsys.readouterr().err
    assert "point method popularity, rate low, seed 0" in said and "nearest valid name is TrainConfig.steps" in said
    assert sweep.main([*argv, "--gin.RetrievalPoint.method=easy"]) == 1 and "expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path)
    assert sweep.main([f"--gin_file={file}", f"--workdir={tmp_path / 'out'}", "--only_plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18 and "method EASE, rate high, seed 2" in lines[-1] and not (tmp_path / "out").exists()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        sweep.main(["--help"])
    assert sweep.EXAMPLE in capsys.readouterr().out


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_of_the_project_loads(path: Path) -> None:
    plan = load_sweep([path])
    points = make_points(plan)
    assert len(check_points([path], [], points)) == len(points) >= 2
    assert isinstance(plan.point, TrainPoint) or plan.metrics
    header = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert f"python -m launch.sweep --gin_file=configs/sweeps/{path.name} " in header and "--workdir=checkpoints/" in header
    assert "minutes" in header and "Expect" in header
