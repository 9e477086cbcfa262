"""The one configuration of a run: all configs composed, read from gin files and overrides. The only module that imports gin.

In: gin files and overrides. Out: a frozen `Experiment`, checked, or a `ValueError` with the file and line.

gin's parser gives the grammar: bindings, scopes, references, macros, includes. Its registry is not used: a process has only
one, it keeps state between loads, and it forgets where a binding was written. `config_tree` builds the dataclasses instead, and
only those that `CONFIGS` lists. A config lives beside the code that reads it; to add one, import it here, list it, and give
`Experiment` or a config a field for it.
"""

from __future__ import annotations

import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gin import config_parser

from monolith_jax.config_tree import Binding, Key, Macro, Reference, build_tree, to_text
from monolith_jax.evaluate.prequential import PrequentialConfig
from monolith_jax.features import (
    BucketFeatureConfig,
    CrossFeatureConfig,
    DenseFeatureConfig,
    FeatureConfig,
    IdFeatureConfig,
    TimeFeatureConfig,
)
from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.threads import MapperConfig
from monolith_jax.lake.counters import WindowCountsConfig
from monolith_jax.lake.history import LakeConfig
from monolith_jax.lake.jobs import LakeJobsConfig, PostgresConfig, TidyConfig
from monolith_jax.lake.warehouse import WarehouseConfig
from monolith_jax.mesh import MeshConfig
from monolith_jax.models.dcn import DCNConfig
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.fm import FMConfig, LinearConfig
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.shared_bottom import SharedBottomConfig
from monolith_jax.models.towers import ModelConfig
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.serve.catalogue import CatalogueConfig
from monolith_jax.serve.feature_cache import FeatureCacheConfig
from monolith_jax.serve.index import IndexConfig
from monolith_jax.serve.pipeline import ServingConfig
from monolith_jax.serve.rerank import RerankConfig
from monolith_jax.serve.seen import SeenConfig
from monolith_jax.serve.sources import SourcesConfig
from monolith_jax.serve.trending import TrendingConfig
from monolith_jax.serve.user_state import UserStateConfig
from monolith_jax.serve.values import CalibrationConfig, GroupValuesConfig, RankConfig
from monolith_jax.snapshot import SnapshotConfig
from monolith_jax.stream.columns import ColumnsConfig
from monolith_jax.stream.counters import CountersConfig
from monolith_jax.stream.history import HistoryConfig
from monolith_jax.stream.joiner import JoinerConfig
from monolith_jax.stream.kuairand import KuaiRandConfig
from monolith_jax.stream.log_source import LogConfig
from monolith_jax.stream.movielens import MovieLensConfig
from monolith_jax.stream.synthetic import SyntheticConfig
from monolith_jax.sync.schedule import PublisherConfig
from monolith_jax.tables.table import TableConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.tables.wire import WireConfig
from monolith_jax.train.loop import TrainConfig

SourceConfig = SyntheticConfig | KuaiRandConfig | MovieLensConfig | ColumnsConfig | LogConfig | LakeConfig

CONFIGS: tuple[type, ...] = (
    *(SyntheticConfig, KuaiRandConfig, MovieLensConfig, ColumnsConfig, LogConfig, JoinerConfig),
    *(LakeConfig, WarehouseConfig, LakeJobsConfig, WindowCountsConfig, PostgresConfig, TidyConfig),
    *(HistoryConfig, CountersConfig),
    *(IdFeatureConfig, CrossFeatureConfig, BucketFeatureConfig, TimeFeatureConfig, DenseFeatureConfig),
    *(TableConfig, AdmissionConfig, MapperConfig, OptimizerConfig),
    *(LinearConfig, FMConfig, DeepFMConfig, DCNConfig, SharedBottomConfig, MMoEConfig),
    *(HeadConfig, TwoTowerConfig),
    *(TrainConfig, SnapshotConfig, PublisherConfig, MeshConfig, WireConfig, PrequentialConfig),
    *(
        ServingConfig,
        CatalogueConfig,
        IndexConfig,
        UserStateConfig,
        SeenConfig,
        SourcesConfig,
        TrendingConfig,
    ),
    *(FeatureCacheConfig, RankConfig, GroupValuesConfig, CalibrationConfig, RerankConfig),
)
"""Every dataclass that a file may bind, in the order of `configs/reference.gin`: the order of the data."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run is made of."""

    source: SourceConfig
    """The examples to learn from."""
    test_source: SourceConfig | None = None
    """Later examples to measure on, never learned from; None: each batch is measured before it is learned from."""
    history: HistoryConfig | None = None
    """What each example is given of its user's past; None: nothing."""
    counters: CountersConfig | None = None
    """Running counts that each example is given; None: none."""
    features: tuple[FeatureConfig, ...]
    """What the model sees of an example."""
    tables: tuple[TableConfig, ...]
    """The name spaces of ids that the features refer to."""
    model: ModelConfig | None = None
    """The ranker, from vectors to logits; None, where there is `retrieval`: none."""
    retrieval: TwoTowerConfig | None = None
    """The two-tower, which finds videos for a user; None: none. A ranker beside it is trained jointly, over the same tables."""
    heads: tuple[HeadConfig, ...] = ()
    """What the ranker predicts, and the loss of each."""
    dense_optimizer: OptimizerConfig
    """How the weights outside the tables learn."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch size, length and start of the run."""
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    """When state is saved."""
    publisher: PublisherConfig | None = None
    """How the trained state is brought to the serving side; None: not at all."""
    mapper: MapperConfig = field(default_factory=MapperConfig)
    """How the host maps ids to rows; results do not depend on it."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices, and how tables are split over them."""
    wire: WireConfig = field(default_factory=WireConfig)
    """How vectors and gradients cross between the devices. Like the mesh it may be another when a run goes on, which then
    rounds as that one does."""
    prequential: PrequentialConfig = field(default_factory=PrequentialConfig)
    """How predictions are measured along the stream."""
    serving: ServingConfig | None = None
    """How requests are answered with the model (`launch.recommend`); training does not look at it."""


def load(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Experiment:
    """Reads files in order, then overrides; the last binding of a field wins.

    Args:
      files: Paths of gin files.
      overrides: Bindings as text, `TrainConfig.steps = 100` or `DATA = "/data"` for a macro.

    Returns:
      The experiment.

    Raises:
      ValueError: A file that does not parse or an include after a binding; an unknown name; a wrong type; a required field left
        out; a binding that nothing uses.
      FileNotFoundError: A file or an include that is not there.
    """
    return load_as(Experiment, CONFIGS, files, overrides)


def to_gin(experiment: Any) -> str:
    """Returns the operative configuration: text that `load` reads as an equal experiment, defaults written out."""
    return f"# The configuration that ran, defaults included. Give it as --gin_file to run it again.\n\n{to_text(experiment)}"


def load_as(root: type, configs: Sequence[type], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Any:
    """Like `load`, for any root and any list of frozen dataclasses."""
    bindings: dict[Key, Binding] = {}
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"no gin file at {file} (looked from {Path.cwd()})")
        _read_file(Path(file), bindings, ())
    for override in overrides:
        place = f"override {override!r}"
        for statement in _statements(override, place, numbered=False):
            if not isinstance(statement, config_parser.BindingStatement):
                raise ValueError(f"{place}: expected NAME = VALUE, got a statement that belongs into a file")
            bindings[_key(statement)] = Binding(statement.value, place)
    return build_tree(root, configs, bindings)


def _read_file(path: Path, bindings: dict[Key, Binding], within: tuple[Path, ...]) -> None:
    """Adds the bindings of a file and its includes to `bindings`, later over earlier."""
    first: dict[Key, str] = {}
    for statement in _statements(path.read_text(encoding="utf-8"), str(path)):
        place = f"{path}:{statement.location.line_num}"
        match statement:
            case config_parser.IncludeStatement():
                if first:
                    raise ValueError(
                        f"{place}: include {statement.filename!r} comes after the binding at {next(iter(first.values()))} and"
                        " would win over it in silence; move every include above the first binding"
                    )
                included = _included(statement.filename, path, place)
                if included.resolve() in (one.resolve() for one in (*within, path)):
                    raise ValueError(f"{place}: include {statement.filename!r} leads back to itself")
                _read_file(included, bindings, (*within, path))
            case config_parser.BindingStatement():
                key = _key(statement)
                if key in first:
                    raise ValueError(f"{place}: {key} is bound twice in this file, first at {first[key]}")
                first[key] = place
                bindings[key] = Binding(statement.value, place)
            case config_parser.ImportStatement():
                raise ValueError(f"{place}: import is not used here: every config that a file may bind is known already")


def _included(name: str, path: Path, place: str) -> Path:
    """Finds an include from the working folder, or from the folder that holds the including file's `configs/`."""
    homes = [parent.parent for parent in path.resolve().parents if parent.name == "configs"]
    tried = [Path(name), *(home / name for home in homes)]
    for one in tried:
        if one.is_file():
            return one
    raise FileNotFoundError(f"{place}: include {name!r} is at none of {', '.join(str(one.absolute()) for one in tried)}")


def _key(statement: config_parser.BindingStatement) -> Key:
    if statement.arg_name:
        return Key(statement.scope, statement.selector, statement.arg_name)
    return Key("", f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector, "")


class _Delegate(config_parser.ParserDelegate):
    """What gin's parser calls for `@name()` and `%name`."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _statements(text: str, place: str, numbered: bool = True) -> Iterator[Any]:
    """Yields gin's statements; what does not parse is told with the place (`numbered`: and the line)."""
    try:
        # Not a generator over the parser alone: its constructor reads the first token and can fail too.
        yield from config_parser.ConfigParser(text, _Delegate())
    except (SyntaxError, tokenize.TokenError) as error:
        if isinstance(error, SyntaxError):
            line, reason = error.lineno, " ".join(error.msg.split())
        else:
            line, reason = error.args[1][0] - 1, error.args[0]
        if "malformed node" in reason:
            reason = f"{reason.rpartition('Failed to parse token ')[2]} is not a value; text goes in quotes"
        where = f"{place}:{line}" if numbered else place
        raise ValueError(f"{where}: {reason}") from error
