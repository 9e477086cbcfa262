"""Reading gin files: what is built, what is refused and how it is told."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monolith_jax.experiment import load_as, to_gin


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    rate: float = 0.1
    schedule: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    name: str
    dim: int = 8
    combine: Literal["sum", "mean"] = "sum"
    ttl_s: float | None = None
    optimizer: RateConfig = RateConfig()

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")


@dataclass(frozen=True, kw_only=True)
class WideConfig:
    units: tuple[int, ...] = (64,)


@dataclass(frozen=True, kw_only=True)
class DeepConfig:
    size: tuple[int, int] = (1, 2)
    weights: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Root:
    model: WideConfig | DeepConfig
    tables: tuple[TableConfig, ...] = ()
    folder: str = ""
    shuffle: bool = False


CONFIGS = (RateConfig, TableConfig, WideConfig, DeepConfig)
MODEL = "Root.model = @WideConfig()\n"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def read(text: str, *overrides: str) -> Root:
    return load_as(Root, CONFIGS, [write("run.gin", text)], overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        read(text, *overrides)
    return str(caught.value)


def test_defaults_and_bindings() -> None:
    assert read(MODEL + "WideConfig.units = [8, 4]\n") == Root(model=WideConfig(units=(8, 4)))


def test_scopes_add_to_what_is_bound_without_one() -> None:
    loaded = read(
        MODEL
        + """
Root.tables = (@user/TableConfig(), @video/TableConfig())
TableConfig.dim = 16
TableConfig.optimizer = @RateConfig()
user/TableConfig.name = "user"
user/RateConfig.rate = 1
video/TableConfig:
    name = "video"
    dim = 32
"""
    )
    user = TableConfig(name="user", dim=16, optimizer=RateConfig(rate=1.0))
    assert loaded.tables == (user, TableConfig(name="video", dim=32))
    assert type(loaded.tables[0].optimizer.rate) is float


def test_outer_scopes_reach_inner_ones() -> None:
    text = 'a/b/TableConfig.dim = 3\na/TableConfig.name = "a"\nRoot.tables = (@a/b/TableConfig(),)\n'
    assert read(MODEL + text).tables == (TableConfig(name="a", dim=3),)


def test_macros_hold_values_and_other_macros() -> None:
    text = """
DATA = "here"
HOME = %DATA
Root.folder = %HOME
Root.tables = (@TableConfig(),)
TableConfig.name = %DATA
"""
    assert read(MODEL + text).folder == "here"
    assert read(MODEL + text, "DATA = '/there'").tables[0].name == "/there"


def test_later_files_and_overrides_win() -> None:
    first, second = write("a.gin", MODEL + 'Root.folder = "a"\n'), write("b.gin", 'Root.folder = "b"\n')
    assert load_as(Root, CONFIGS, [first, second]).folder == "b"
    assert load_as(Root, CONFIGS, [second, first]).folder == "a"
    assert load_as(Root, CONFIGS, [first, second], ["Root.folder = 'c'", "Root.folder = 'd'"]).folder == "d"


def test_includes_are_found_from_the_working_folder_and_from_above_configs(tmp_path: Path) -> None:
    write("project/configs/models/wide.gin", MODEL)
    write("project/configs/run.gin", "include 'configs/models/wide.gin'\nWideConfig.units = (2,)\n")
    assert load_as(Root, CONFIGS, ["project/configs/run.gin"]).model == WideConfig(units=(2,))
    os.chdir("project")
    assert load_as(Root, CONFIGS, ["configs/run.gin"]).model == WideConfig(units=(2,))
    os.chdir("/")
    assert load_as(Root, CONFIGS, [tmp_path / "project/configs/run.gin"]).model == WideConfig(units=(2,))


def test_one_load_leaves_nothing_for_the_next() -> None:
    assert read(MODEL + 'Root.folder = "x"').folder == "x"
    refusal(MODEL + "DIM = 3\nRoot.folder = 1")
    assert read(MODEL).folder == ""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('RateConfig.rate = "fast"', "run.gin:4: RateConfig.rate: expected float, got 'fast' (str)"),
        ("RateConfig.rate = True", "expected float, got True (bool)"),
        ("RateConfig.schedule = ((1, 0.5), (2,))", "expected tuple[tuple[int, float], ...], got ((1, 0.5), (2,)) (tuple)"),
        ("TableConfig.dim = 8.0", "run.gin:4: TableConfig.dim: expected int, got 8.0 (float)"),
        ("TableConfig.dim = True", "expected int, got True (bool)"),
        ("TableConfig.dim = None", "expected int, got None (NoneType)"),
        ('TableConfig.ttl_s = "1"', "expected float | None, got '1' (str)"),
        ('TableConfig.combine = "men"', "expected 'sum' | 'mean', got 'men' (str); the nearest valid name is mean"),
        ("Root.shuffle = 1", "Root.shuffle: expected bool, got 1 (int)"),
        ("Root.folder = %DATA\nDATA = 1", "run.gin:4: Root.folder: expected str, got 1 (int)"),
        ("WideConfig.units = 8", "expected tuple[int, ...], got 8 (int)"),
        ("TableConfig.optimizer = @WideConfig()", "TableConfig.optimizer: expected RateConfig, got WideConfig"),
        ("TableConfig.dim = 0", "run.gin:4: TableConfig.dim: dim must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_told_with_both_sides(line: str, told: str) -> None:
    needed = "" if line.startswith("TableConfig.optimizer") else "TableConfig.optimizer = @RateConfig()"
    text = f'{MODEL}Root.tables = (@TableConfig(),)\nTableConfig.name = "a"; {line}\n{needed}'.replace("; ", "\n")
    assert told in refusal(text)


@pytest.mark.parametrize("value", ["@TableConfig()", "@Root()", "3", "(1, 2)"])
def test_wrong_model_is_refused(value: str) -> None:
    told = refusal(f'Root.model = {value}\nTableConfig.name = "a"\n')
    assert told.startswith("run.gin:1: ")
    assert "Root.model: expected WideConfig | DeepConfig, got" in told or "Root -> Root refers to itself" in told


def test_fixed_tuples_and_mappings() -> None:
    loaded = read('Root.model = @DeepConfig()\nDeepConfig.size = (3, 4)\nDeepConfig.weights = {"like": 1}\n')
    assert loaded.model == DeepConfig(size=(3, 4), weights={"like": 1.0})
    assert "expected tuple[int, int], got (3,)" in refusal("Root.model = @DeepConfig()\nDeepConfig.size = (3,)")
    assert "expected dict[str, float] | None" in refusal("Root.model = @DeepConfig()\nDeepConfig.weights = {1: 2.0}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "TabelConfig.dim = 1",
            "run.gin:2: TabelConfig.dim: there is no config named TabelConfig; the nearest valid name is TableConfig",
        ),
        ("WideConfig.unit = 1", "WideConfig has no field named unit; the nearest valid name is WideConfig.units"),
        ("WideConfig.schedule = 1", "the nearest valid name is WideConfig.units; schedule is a field of RateConfig"),
        ("WideConfig = 1", "run.gin:2: WideConfig is a config; bind one of its fields"),
        (
            "DeepConfig.size = (1, 2)",
            "run.gin:2: DeepConfig.size is bound but never used: nothing refers to @DeepConfig(), which",
        ),
        ("RateConfig.rate = 1", "nothing refers to @RateConfig(), which TableConfig.optimizer takes"),
        (
            "A = 1\nRateConfig.rate = 1",
            "run.gin:2: A is bound but never used; the nearest valid name is Root.model; also unused: Ra",
        ),
        ("deep/WideConfig.units = (1,)", "deep/WideConfig.units is bound but never used"),
        ("DIM = 3", "run.gin:2: DIM is bound but never used"),
        ("Root.folder = %DATA", "macro DATA has no value: write DATA = <value> in a file or give --gin.DATA=<value>"),
        ("Root.folder = %DATA\nDATA = %DATA", "run.gin:3: macro DATA refers to itself"),
        ("Root.tables = (@TabelConfig(),)", "run.gin:2: @TabelConfig(): there is no config named TabelConfig; the nearest"),
        ("Root.tables = (@TableConfig,)", "write @TableConfig() for the config"),
        (
            "Root.tables = (@user/TableConfig(),)",
            "user/TableConfig needs a value for name: write user/TableConfig.name = <str>",
        ),
        (
            "WideConfig.units = (1,)\nWideConfig.units = (2,)",
            "run.gin:3: WideConfig.units is bound twice in this file, first at run",
        ),
    ],
)
def test_names_that_lead_nowhere_are_refused(line: str, told: str) -> None:
    assert told in refusal(MODEL + line)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Root.folder = here", "run.gin:2: 'here' is not a value; text goes in quotes"),
        ("Root.folder =", "run.gin:2: Unable to parse value."),
        ("Root.folder 'here'", "run.gin:2: Couldn't parse statement"),
        ("Root.tables = (1,", "run.gin:2: EOF in multi-line statement"),
        ("import os", "run.gin:2: import is not used here"),
    ],
)
def test_what_does_not_parse_is_told_with_its_line(line: str, told: str) -> None:
    assert told in refusal(MODEL + line)


def test_late_include_is_refused() -> None:
    write("wide.gin", MODEL)
    told = refusal("WideConfig.units = (1,)\n\ninclude 'wide.gin'\n")
    assert told.startswith("run.gin:3: include 'wide.gin' comes after the binding at run.gin:1")


def test_include_that_leads_back_or_nowhere_is_refused() -> None:
    assert "run.gin:1: include 'run.gin' leads back to itself" in refusal("include 'run.gin'\n")
    with pytest.raises(FileNotFoundError, match=r"run.gin:1: include 'gone.gin' is at none of"):
        read("include 'gone.gin'\n")
    with pytest.raises(FileNotFoundError, match=r"no gin file at gone.gin"):
        load_as(Root, CONFIGS, ["gone.gin"])


def test_errors_in_an_include_name_the_included_file() -> None:
    write("wide.gin", MODEL + "\nWideConfig.units = 3\n")
    assert refusal("include 'wide.gin'\n").startswith("wide.gin:3: WideConfig.units: expected")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("WideConfig.unit = 1", "override 'WideConfig.unit = 1': WideConfig.unit: WideConfig has no field named unit"),
        ("WideConfig.units = 1", "override 'WideConfig.units = 1': WideConfig.units: expected tuple[int, ...], got 1 (int)"),
        ("FOLDER = 1", "override 'FOLDER = 1': FOLDER is bound but never used"),
        ("include 'run.gin'", "expected NAME = VALUE"),
        ("Root.folder = ", "override 'Root.folder = ': Unable to parse value."),
    ],
)
def test_wrong_overrides_are_told(override: str, told: str) -> None:
    assert told in refusal(MODEL, override)


def test_missing_root_field_says_what_to_write() -> None:
    assert "Root needs a value for model: write Root.model = <WideConfig | DeepConfig>" in refusal("Root.shuffle = True\n")


rates = st.builds(
    RateConfig,
    rate=st.floats(allow_nan=False),
    schedule=st.lists(st.tuples(st.integers(), st.floats(allow_nan=False)), max_size=30).map(tuple),
)
tables = st.builds(
    TableConfig,
    name=st.text(max_size=8) | st.just("user"),
    dim=st.integers(1),
    combine=st.sampled_from(["sum", "mean"]),
    ttl_s=st.none() | st.floats(allow_nan=False),
    optimizer=rates,
)
models = st.builds(WideConfig, units=st.lists(st.integers(), max_size=3).map(tuple)) | st.builds(
    DeepConfig, weights=st.none() | st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False))
)


@given(st.builds(Root, model=models, tables=st.lists(tables, max_size=4).map(tuple), folder=st.text(), shuffle=st.booleans()))
def test_operative_text_reads_as_an_equal_tree(tree: Root) -> None:
    assert load_as(Root, CONFIGS, [write("config.gin", to_gin(tree))]) == tree


def test_operative_text_is_written_for_people() -> None:
    tree = Root(model=WideConfig(), tables=(TableConfig(name="user"), TableConfig(name="video", dim=4)))
    text = to_gin(tree)
    assert "Root.tables = (@user/TableConfig(), @video/TableConfig())\n" in text
    assert "\nuser/TableConfig.optimizer = @RateConfig()\n" in text
    assert text.count("RateConfig.rate = 0.1\n") == 1


def test_what_no_file_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nan .* cannot be written"):
        to_gin(RateConfig(rate=float("nan")))
