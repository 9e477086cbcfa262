"""The groups of a model that are in two tiers, as the loop sees them: rows come and go between two steps.

In: the state after a step and the moves of the next plan. Out: the state that step starts from; for a snapshot the same state
with all rows, which is what it would be if all of them were on the device; and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from monolith_jax.ids.exchange import Exchange
from monolith_jax.mesh import OF_PROCESSES, sharding
from monolith_jax.tables.table import empty_array
from monolith_jax.tables.tiered import HostRows
from monolith_jax.train.state import Model, TrainState
from monolith_jax.types import Moves


class Tiers:
    """What the host holds of a model's tables. Without tables in two tiers it holds nothing and changes nothing."""

    def __init__(self, model: Model, exchange: Exchange | None = None, pinned: bool | None = None) -> None:
        """Takes the host's memory for all rows of the groups in two tiers.

        Args:
            model: The model.
            exchange: To the other processes, each of which holds the rows of its own devices; none: this is the only one.
            pinned: See `HostRows`.
        """
        self._model, self._exchange = model, exchange
        self._hosts = tuple(HostRows(group, model.mesh, pinned) if group.tiered else None for group in model.groups)

    def move(self, state: TrainState, moves: Sequence[Moves | None]) -> TrainState:
        """Returns the state with the rows of a plan in their slots; the groups passed in are used up.

        Args:
            state: As the step before that plan left it.
            moves: Of the plan, for each group. Plans come in order, none is left out.
        """
        if not any(self._hosts):
            return state
        parts = zip(self._hosts, state.groups, moves, strict=True)
        return state._replace(groups=tuple(_moved(host, array, of_group) for host, array, of_group in parts))

    def whole(self, state: TrainState) -> TrainState:
        """Returns the state with all rows, [L, R, W] of each group, as a snapshot keeps it.

        Those of two tiers are numpy arrays that the next move changes: copy them, as `Snapshots.save` does. With several
        processes they are copies, each part in the memory of its host.
        """
        exchange, arrays = self._exchange, []
        for host, array in zip(self._hosts, state.groups, strict=True):
            if host is not None:
                array = exchange.spread(host.whole(array)) if exchange else host.whole(array)
            arrays.append(array)
        return state._replace(groups=tuple(arrays))

    def like(self, state: TrainState) -> TrainState:
        """Returns the form of `whole(state)`, for `Snapshots.restore`."""
        # Without a place: as numpy arrays.
        where = sharding(self._exchange.mesh, OF_PROCESSES) if self._exchange else None
        shapes = (
            array if host is None else jax.ShapeDtypeStruct(group.shape, group.rows.array_dtype, sharding=where)
            for host, array, group in zip(self._hosts, state.groups, self._model.groups, strict=True)
        )
        return state._replace(groups=tuple(shapes))

    def split(self, state: TrainState) -> TrainState:
        """Takes over all rows of a state as `whole` returns it; returns the state with no row on the device.

        The mapper must not take any for resident: it was made anew, or its state was set.
        """
        arrays = []
        for host, array, group in zip(self._hosts, state.groups, self._model.groups, strict=True):
            if host is not None:
                host.fill(self._exchange.mine(array) if self._exchange else np.asarray(array))
                array = empty_array(group, self._model.mesh)
            arrays.append(array)
        return state._replace(groups=tuple(arrays))


def _moved(host: HostRows | None, array: Any, moves: Moves | None) -> Any:
    if host is None:
        return array
    assert moves is not None, "the mapper of a group in two tiers has no slots"
    return host.move(array, moves)
