"""Who had been shown what, exactly: what held-out sessions are judged against.

In: pairs of users and videos of the training source, then each held-out session once it is over. Out: whether a user had been
shown a video, and when anyone was shown it first.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Past:
    """All that was shown: of training as sorted arrays, of what came later as sets."""

    def __init__(self) -> None:
        """Nobody was shown anything."""
        self._parts: list[np.ndarray] = []
        self._of_training: dict[int, np.ndarray] = {}
        self._later: dict[int, set[int]] = {}
        self._first: dict[int, int] = {}

    def add_training(self, users: np.ndarray, videos: np.ndarray) -> None:
        """Adds pairs of the training source, int64 [N] each; `end_training` comes behind the last ones."""
        self._parts.append(np.unique(np.stack([users, videos], axis=1), axis=0))

    def end_training(self) -> None:
        """Sorts the pairs of training by user."""
        if not self._parts:
            return
        pairs = np.concatenate(self._parts)
        self._parts.clear()
        users, videos = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
        found, starts = np.unique(users, return_index=True)
        self._of_training = dict(zip(found.tolist(), np.split(videos, starts[1:]), strict=True))
        self._first = dict.fromkeys(np.unique(videos).tolist(), -1)

    def add(self, user: int, videos: Iterable[int]) -> None:
        """Adds what a session that is over showed."""
        self._later.setdefault(user, set()).update(videos)

    def note(self, video: int, number: int) -> None:
        """Notes that a video was in the held-out example of this number."""
        self._first.setdefault(video, number)

    def shown(self, user: int, video: int) -> bool:
        """Returns whether a user was shown a video in training, or in a session that was added."""
        of_user = self._of_training.get(user)
        if of_user is not None:
            at = int(np.searchsorted(of_user, video))
            if at < of_user.size and of_user[at] == video:
                return True
        return video in self._later.get(user, ())

    def known(self, video: int, number: int) -> bool:
        """Returns whether anyone was shown a video in training, or in a held-out example before that of this number."""
        return self._first.get(video, number) < number
