"""A new run from an old one's snapshot: tables and matching weights are taken over, and what matched is listed.

In: a restored snapshot of any config, and the new model with its first state. Out: the state with the old values in it, the id
maps that go with it, and a line for every table and weight. A table matches by name and dim (optimizer slots only where the
optimizer has the same name and arguments; its learning rate may differ), a dense weight by path and shape. `max_rows` may
differ: ids are inserted anew, latest seen first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.mapper import Mapper
from monolith_jax.mesh import ROWS, sharding
from monolith_jax.snapshot import Restored
from monolith_jax.tables.table import Group
from monolith_jax.tables.update import first_rows, vectors_of
from monolith_jax.train.state import Model, TrainState, state_shardings


def take_over(
    model: Model, state: TrainState, mapper: Mapper, old: Restored, identity: Mapping[str, Any]
) -> tuple[TrainState, list[str]]:
    """Fills a new state and its maps from an old snapshot.

    Args:
        model: The new model.
        state: Its first state.
        mapper: Its id maps, empty; filled here.
        old: The snapshot, restored as plain arrays.
        identity: The configs that the snapshot belongs to.

    Returns:
        The state with all rows (those of groups in two tiers as numpy arrays, for `Tiers.split`), and a line for each table and
        weight: taken over, or why not.
    """
    lines: list[str] = []
    sources = _old_tables(old, identity)
    arrays = []
    for group, mapper_of_group in zip(model.groups, mapper.groups, strict=True):
        array = np.zeros(group.shape, group.rows.array_dtype)
        for index, table in enumerate(group.tables):
            source = sources.get(table.name)
            if source is None or source["dim"] != table.dim:
                known = "not in the snapshot" if source is None else f"dim {table.dim} here, {source['dim']} in the snapshot"
                lines.append(f"table {table.name}: starts empty ({known})")
                continue
            lines.append(_take_table(group, index, mapper_of_group.maps, array, source))
        # All rows of a group in two tiers may be more than the device holds.
        arrays.append(array if group.tiered else jax.device_put(array, sharding(model.mesh, ROWS)))
    weights = _take_weights(state.weights, old.state["weights"], lines)
    return state._replace(weights=jax.device_put(weights, state_shardings(model).weights), groups=tuple(arrays)), lines


def _old_tables(old: Restored, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns for each table of the snapshot its group's maps and array, and its config."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for table in identity["tables"]:
        groups.setdefault(repr((table["dim"], table.get("dtype"), table["optimizer"])), []).append(table)
    sources = {}
    of_groups = old.state["groups"]
    for index, tables in enumerate(groups.values()):
        layout = MapLayout(
            tuple(table["name"] for table in tables), tuple(table["max_rows"] for table in tables), identity["num_shards"]
        )
        maps = IdMaps(layout)
        maps.set_state(old.host["maps"][index])
        for position, table in enumerate(tables):
            sources[table["name"]] = {**table, "maps": maps, "position": position, "array": np.asarray(of_groups[index])}
    return sources


def _take_table(group: Group, index: int, maps: IdMaps, array: np.ndarray, source: Mapping[str, Any]) -> str:
    old_maps: IdMaps = source["maps"]
    ids, shards, rows, seen_s = old_maps.entries(source["position"])
    latest_first = np.argsort(-seen_s.astype(np.int64), kind="stable")
    ids, shards, rows, seen_s = ids[latest_first], shards[latest_first], rows[latest_first], seen_s[latest_first]
    new_shards, new_rows, *_ = maps.lookup_or_insert(ids, index, seen_s.astype(np.uint32))
    kept = new_rows >= 0
    values = source["array"][shards[kept], old_maps.layout.row_offsets[source["position"]] + rows[kept]]
    old_rows = dataclasses.replace(group.rows, vector_dtype=source.get("dtype", "float32"))
    same_optimizer = _state_kind(source["optimizer"]) == _state_kind(_plain(group.tables[index].optimizer))
    if not same_optimizer or old_rows != group.rows:
        slots = values[:, old_rows.vector_width :]
        values = np.array(first_rows(group.rows, vectors_of(old_rows, jax.numpy.asarray(values))))
        if same_optimizer:
            values[:, group.rows.vector_width :] = slots
    array[new_shards[kept], group.maps.row_offsets[index] + new_rows[kept]] = values
    left = f", {np.count_nonzero(~kept):,} did not fit" if not kept.all() else ""
    anew = "" if same_optimizer else ", optimizer slots start anew"
    return f"table {group.tables[index].name}: {np.count_nonzero(kept):,} rows taken over{left}{anew}"


def _plain(config: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _state_kind(optimizer: Mapping[str, Any]) -> Any:
    """Returns what an optimizer's slots depend on: not its learning rate, but with ftrl, whose weights follow from both."""
    return optimizer["name"], optimizer["arguments"], optimizer["learning_rate"] if optimizer["name"] == "ftrl" else None


def _take_weights(weights: Any, old: Any, lines: list[str]) -> Any:
    old_leaves = {_path(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(old)}

    def choose(path: Any, leaf: jax.Array) -> Any:
        name = _path(path)
        found = old_leaves.get(name)
        if found is None or found.shape != leaf.shape:
            reason = "not in the snapshot" if found is None else f"shape {leaf.shape} here, {found.shape} in the snapshot"
            lines.append(f"weight {name}: starts anew ({reason})")
            return leaf
        lines.append(f"weight {name}: taken over")
        return found

    return jax.tree_util.tree_map_with_path(choose, weights)


def _path(path: Any) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
