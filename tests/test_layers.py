"""Holds the layout: who may import whom, how large a file and a function may be, which names say nothing."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "monolith_jax"
FILES = sorted(path for folder in ("monolith_jax", "launch", "tests") for path in (ROOT / folder).rglob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
SAYS_NOTHING = {"utils", "util", "common", "helpers", "helper", "base", "core", "lib", "misc"}
STARTS_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}
OWNERS = {
    "confluent_kafka": "stream/kafka_client.py",
    "gin": "experiment.py",
    "grain": "stream/batcher.py",
    "orbax": "snapshot.py",
    "tensorstore": "snapshot.py",
}
FORBIDDEN = {"train": {"serve", "stream", "evaluate"}, "serve": {"train"}, "evaluate": {"train"}}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Returns every dotted name that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            found.update((node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)))
    return frozenset(found)


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_compiled(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in node.decorator_list}
    return bool(names & {"numba.njit", "jit", "inline", "inner", "_intrinsic"})


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def stages(path: Path) -> set[str]:
    """Returns the folders and top-level modules of the package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("monolith_jax.")}


def reached(path: Path) -> set[Path]:
    """Returns the package's modules that run when `path` is imported, itself and every package above included."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        above = [parent / "__init__.py" for parent in one.parents if parent.is_relative_to(PACKAGE)]
        named = [ROOT.joinpath(*name.split(".")) for name in imports(one) if name.startswith("monolith_jax")]
        files = [*above, *(path.with_suffix(".py") for path in named), *(path / "__init__.py" for path in named)]
        todo.extend(file for file in files if file.is_file())
    return seen


def is_host(path: Path) -> bool:
    name = name_of(path)
    return (name.startswith(("stream/", "ids/")) and name not in ("stream/batcher.py", "ids/exchange.py")) or name in (
        "features.py",
        "types.py",
        "__init__.py",
        "sync/__init__.py",
        "sync/chain.py",
        "sync/delta.py",
        "sync/delta_files.py",
        "sync/epochs.py",
        "sync/manifest.py",
        "sync/quantise.py",
        "sync/readers.py",
        "sync/schedule.py",
        "sync/storage.py",
        "sync/touched.py",
        "serve/id_slots.py",
        "serve/log_tail.py",
        "serve/merge.py",
        "serve/recent.py",
        "serve/seen.py",
        "serve/source_report.py",
        "serve/sources.py",
        "serve/trending.py",
        "serve/user_state.py",
    )


def test_the_rules_see_the_package() -> None:
    assert {"types.py", "experiment.py", "stream/events.py"} <= {name_of(path) for path in MODULES if path.parent != ROOT}
    assert any(is_host(path) for path in MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_functions_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{path} has {lines} lines, the most is 400: split it where the data passes from one step to the next"
    for node in functions(tree_of(path)):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines, the most is 60"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_is_annotated(path: Path) -> None:
    # numba types what it compiles by the arrays that it is called with; such a function tells dtypes and shapes in words.
    compiled = {inner for node in functions(tree_of(path)) if is_compiled(node) for inner in functions(node)}
    for node in functions(tree_of(path)):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [one.arg for one in every if one and one.annotation is None and one.arg not in ("self", "cls")]
        missing = bare + ["return"] * (node.returns is None)
        assert not missing or node in compiled, f"{path}:{node.lineno} {node.name} leaves {', '.join(missing)} without a type"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_name_says_something(path: Path) -> None:
    parts = {*path.relative_to(ROOT).with_suffix("").parts, path.stem.removeprefix("test_")}
    assert not parts & SAYS_NOTHING, f"{path}: name it after what passes through it"


@pytest.mark.parametrize("path", [path for path in MODULES if is_host(path)], ids=name_of)
def test_host_side_never_starts_jax(path: Path) -> None:
    for one in reached(path):
        assert not roots(one) & STARTS_JAX, f"{path} runs {one}, which imports {roots(one) & STARTS_JAX}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_layers(path: Path) -> None:
    for library, owner in OWNERS.items():
        assert library not in roots(path) or name_of(path) == owner, f"{path} imports {library}; only {owner} does"
    stage = path.relative_to(PACKAGE).parts[0]
    assert stage == "lake" or not {"pypaimon", "psycopg2"} & roots(path), f"{path} imports what only lake does"
    crossed = FORBIDDEN.get(stage, set()) & stages(path)
    assert not crossed, f"{path} imports {crossed}, which {stage} must not know"
    assert "launch" not in roots(path), f"{path} imports launch; the package knows no command"
    if name_of(path) != "experiment.py":
        assert not {"train", "evaluate"} <= stages(path), f"{path} imports train and evaluate; only launch knows both"
        assert "experiment" not in stages(path), f"{path} imports experiment, which imports every stage; only launch does"
