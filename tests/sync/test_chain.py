"""Holds which versions a reader is led through, and that they bring it to what the trainer had."""

import dataclasses
import random
from collections.abc import Collection

import pytest

from monolith_jax.sync.chain import find_chain, find_since
from monolith_jax.sync.manifest import Manifest, Version


def version(text: str) -> Version:
    epoch, sequence = text.split(".")
    return Version(int(epoch), int(sequence))


def log_of(text: str) -> dict[Version, Manifest]:
    """Returns manifests of a text: `B1.1` a base, `D1.2<1.1/1.0` a delta behind 1.1 whose base is 1.0."""
    log: dict[Version, Manifest] = {}
    for word in text.split():
        name, _, rest = word[1:].partition("<")
        previous, _, base = rest.partition("/")
        one = version(name)
        log[one] = Manifest(
            kind="base" if word[0] == "B" else "delta",
            version=one,
            previous=version(previous) if previous else None,
            base=version(base) if base else one,
            step=0,
            event_time_ms=0,
            created_ms=0,
            position=[],
            format="float32",
            files={"rows": [100 if word[0] == "B" else 10, ""]},
        )
    return log


def chain_of(text: str, after: str = "", without: str = "", damaged: str = "") -> str:
    log = log_of(text)
    hidden = {version(one) for one in damaged.split()}
    found = find_chain(
        sorted(log),
        lambda one: None if one in hidden else log[one],
        version(after) if after else None,
        {version(one) for one in without.split()},
    )
    return " ".join(f"{one.epoch}.{one.sequence}" for one in found)


PLAIN = "B1.1 D1.2<1.1/1.1 D1.3<1.2/1.1 D1.4<1.3/1.1"
TWO_BASES = "B1.1 D1.2<1.1/1.1 D1.3<1.2/1.1 B1.4<1.3 D1.5<1.3/1.4 D1.6<1.5/1.4"
LATE = "B1.1 D1.2<1.1/1.1 D1.3<1.2/1.1 B1.4<1.3 D1.5<1.3/1.1 D1.6<1.5/1.1"
THROUGH_BASE = "B1.1 D1.2<1.1/1.1 D1.3<1.2/1.1 B1.4<1.3 D1.5<1.4/1.4 D1.6<1.5/1.4"
MANY = "B1.1 " + " ".join(f"D1.{n}<1.{n - 1}/1.1" for n in range(2, 30)) + " B1.30<1.29 D1.31<1.29/1.30"


@pytest.mark.parametrize(
    ("log", "after", "wanted"),
    [
        ("", "", ""),
        ("B1.1", "", "1.1"),
        ("B1.1", "1.1", ""),
        ("D1.2<1.1/1.1", "", ""),
        (PLAIN, "", "1.1 1.2 1.3 1.4"),
        (PLAIN, "1.1", "1.2 1.3 1.4"),
        (PLAIN, "1.3", "1.4"),
        (PLAIN, "1.4", ""),
        ("B1.1 D1.2</1.1", "1.1", "1.2"),
        *[
            (log, after, wanted)
            for log in (TWO_BASES, LATE, THROUGH_BASE)
            for after, wanted in {
                "": "1.4 1.5 1.6",
                "1.1": "1.2 1.3 1.5 1.6",
                "1.3": "1.5 1.6",
                "1.4": "1.5 1.6",
                "1.5": "1.6",
                "1.6": "",
            }.items()
        ],
        ("B1.1 D1.2<1.1/1.1 B1.3<1.2", "1.2", ""),
        ("B1.1 D1.2<1.1/1.1 B1.3<1.2", "1.1", "1.2"),
        ("B1.1 D1.2<1.1/1.1 B1.3<1.2 B1.4<1.2", "1.3", ""),
        ("B1.1 D1.2<1.1/1.1 B1.3<1.2 B1.4<1.3", "1.2", ""),
        (MANY, "1.1", "1.30 1.31"),
        (MANY, "1.25", "1.26 1.27 1.28 1.29 1.31"),
    ],
    ids=str,
)
def test_a_reader_goes_the_short_way(log: str, after: str, wanted: str) -> None:
    assert chain_of(log, after) == wanted


@pytest.mark.parametrize(
    ("log", "after", "wanted"),
    [
        ("B1.1 D1.2<1.1/1.1 D1.4<1.3/1.1 D1.5<1.4/1.1", "", "1.1 1.2"),
        ("B1.1 D1.2<1.1/1.1 D1.4<1.3/1.1 D1.5<1.4/1.1", "1.1", "1.2"),
        ("B1.1 D1.2<1.1/1.1 D1.4<1.3/1.1 D1.5<1.4/1.1", "1.2", ""),
        ("B1.1 D1.2<1.1/1.1 D1.4<1.3/1.1 B1.6<1.5 D1.7<1.5/1.6", "1.2", "1.6 1.7"),
        ("B1.1 D1.2<1.1/1.1 D1.4<1.3/1.1 B1.6<1.5 D1.7<1.5/1.6", "1.5", "1.7"),
        ("B1.4<1.3 D1.5<1.3/1.4", "1.2", "1.4 1.5"),
        ("B1.4<1.3 D1.5<1.3/1.4", "1.3", "1.5"),
        ("B1.4<1.3 D1.5<1.4/1.4", "1.3", "1.5"),
        ("B1.4<1.3 D1.5<1.3/1.4 D1.6<1.5/1.4", "1.5", "1.6"),
    ],
    ids=str,
)
def test_holes_and_pruned_history(log: str, after: str, wanted: str) -> None:
    assert chain_of(log, after) == wanted


@pytest.mark.parametrize(
    ("log", "after", "wanted"),
    [
        # the first delta of an epoch names the last one before it, or nothing
        (PLAIN + " D2.1<1.4/1.1 D2.2<2.1/1.1", "", "1.1 1.2 1.3 1.4 2.1 2.2"),
        (PLAIN + " D2.1<1.4/1.1 D2.2<2.1/1.1", "1.3", "1.4 2.1 2.2"),
        (PLAIN + " D2.1</1.1 D2.2<2.1/1.1", "1.4", "2.1 2.2"),
        (PLAIN + " D2.1</1.1 D2.2<2.1/1.1", "1.2", "1.3 1.4 2.1 2.2"),
        (PLAIN + " D2.1</1.1 D2.2<2.1/1.1", "", "1.1 1.2 1.3 1.4 2.1 2.2"),
        # with a base of its own before or behind it
        (PLAIN + " B2.1<1.4 D2.2<1.4/2.1", "1.4", "2.2"),
        (PLAIN + " B2.1<1.4 D2.2<1.4/2.1", "2.1", "2.2"),
        (PLAIN + " B2.1<1.4 D2.2<1.4/2.1", "", "2.1 2.2"),
        (PLAIN + " B2.1 D2.2</2.1", "1.4", "2.1 2.2"),
        (PLAIN + " B2.1 D2.2<1.4/2.1", "2.1", "2.2"),
        (PLAIN + " D2.1<1.4/1.1 B2.2<2.1 D2.3<2.1/2.2", "1.4", "2.1 2.3"),
        # a base of a new epoch has taken rows back: nobody steps over it alone
        (PLAIN + " B2.1<1.4", "1.4", "2.1"),
        (PLAIN + " B2.1<1.4 D2.2<2.1/2.1", "1.4", "2.1 2.2"),
        # an older trainer that went on is left behind
        (PLAIN + " D1.5<1.4/1.1 D2.1<1.4/1.1", "1.4", "2.1"),
        (PLAIN + " D1.5<1.4/1.1 D2.1<1.4/1.1", "1.5", ""),
        (PLAIN + " D1.5<1.4/1.1 D2.1<1.4/1.1 B2.2<2.1 D2.3<2.1/2.2", "1.5", "2.2 2.3"),
        (PLAIN + " D2.1<1.4/1.1 D1.6<1.5/1.1", "2.1", ""),
    ],
    ids=str,
)
def test_a_new_epoch(log: str, after: str, wanted: str) -> None:
    assert chain_of(log, after) == wanted


def test_what_cannot_be_read_is_gone_around() -> None:
    assert chain_of(TWO_BASES, "", without="1.4") == "1.1 1.2 1.3 1.5 1.6"
    assert chain_of(TWO_BASES, "", damaged="1.4") == "1.1 1.2 1.3 1.5 1.6"
    assert chain_of(THROUGH_BASE, "", without="1.4") == "1.1 1.2 1.3 1.5 1.6"
    assert chain_of(TWO_BASES, "1.1", without="1.3") == "1.4 1.5 1.6"
    assert chain_of(TWO_BASES, "1.1", damaged="1.2") == "1.4 1.5 1.6"
    assert chain_of(TWO_BASES, "1.4", damaged="1.5") == ""
    assert chain_of(PLAIN, "1.2", without="1.3") == ""


class Trainer:
    """A trainer that publishes, is killed and goes on from its snapshot; rows are numbers."""

    def __init__(self, rng: random.Random, names_bases: bool) -> None:
        self.rng, self.names_bases = rng, names_bases
        self.rows: dict[int, int] = {}
        self.touched: set[int] = set()
        self.log: dict[Version, Manifest] = {}
        self.content: dict[Version, dict[int, int | None]] = {}
        self.truth: dict[Version, dict[int, int]] = {}
        self.pending: list[Manifest] = []
        self.epoch, self.sequence, self.last_delta, self.last_base = 1, 0, None, None
        self.at = 0
        self.told: list[list[Version] | None] = []
        self.snapshot: tuple[dict[int, int], int] = ({}, 0)
        self.base()

    def step(self) -> None:
        self.at += 1
        one = self.rng.randrange(12)
        self.touched.add(one)
        if self.rng.random() < 0.3:
            self.rows.pop(one, None)
        else:
            self.rows[one] = self.rng.randrange(10**9)

    def manifest(self, kind: str, previous: Version | None, base: Version | None) -> Manifest:
        self.sequence += 1
        one = Version(self.epoch, self.sequence)
        size = len(self.rows) if kind == "base" else len(self.touched)
        like = log_of("B1.1")[Version(1, 1)]
        return dataclasses.replace(
            like, step=self.at, kind=kind, version=one, previous=previous, base=base or one, files={"rows": [1 + size, ""]}
        )

    def base(self) -> None:
        if self.last_delta:  # a base has the state of a delta: what no delta has told could never be taken back
            self.delta()
        one = self.manifest("base", self.last_delta, None)
        self.content[one.version] = dict(self.rows)
        self.truth[one.version] = dict(self.rows)
        self.pending.append(one)
        if not self.log or self.rng.random() < 0.6:
            self.land()

    def land(self) -> None:
        for one in self.pending:
            self.log[one.version] = one
            self.last_base = max(self.last_base or one.version, one.version)
        self.pending = []

    def delta(self) -> None:
        previous = self.last_delta
        assert self.last_base
        if previous is None or (self.names_bases and self.epoch == self.last_base.epoch and previous < self.last_base):
            previous = self.last_base
        one = self.manifest("delta", previous, self.last_base)
        self.content[one.version] = {row: self.rows.get(row) for row in self.touched}
        self.truth[one.version] = dict(self.rows)
        self.log[one.version] = one
        self.touched, self.last_delta = set(), one.version

    def save(self) -> None:
        self.snapshot = (dict(self.rows), self.at)

    def die(self) -> None:
        self.pending = []
        rows, self.at = self.snapshot
        self.rows = dict(rows)
        self.epoch, self.sequence = self.epoch + 1, 0
        try:
            told = find_since(max(self.log), self.log.__getitem__, self.at)
        except (KeyError, ValueError):
            told = None
        self.told.append(told)
        if told is not None:
            self.touched = {row for one in told for row in self.content[one]}
            self.delta()
            if self.rng.random() < 0.5:
                self.base()
        else:  # what was told cannot be taken back one by one
            self.touched, self.last_delta = set(), None
            self.base()
            self.land()
        self.save()


class Reader:
    """Applies what the chain says."""

    def __init__(self) -> None:
        self.at: Version | None = None
        self.rows: dict[int, int] = {}

    def catch_up(self, trainer: Trainer, damaged: Collection[Version], most: int) -> None:
        for one in find_chain(sorted(trainer.log), trainer.log.get, self.at, damaged)[:most]:
            assert one not in damaged and (self.at is None or one > self.at)
            if trainer.log[one].kind == "base":
                self.rows = {}
            for row, value in trainer.content[one].items():
                self.rows.pop(row, None)
                if value is not None:
                    self.rows[row] = value
            self.at = one
            assert self.rows == trainer.truth[one]


def test_what_a_resumed_trainer_takes_back() -> None:
    log = log_of("B1.1 D1.2<1.1/1.1 D1.3<1.2/1.1 B1.4<1.3 D1.5<1.3/1.4 D2.1<1.5/1.4 D2.2<2.1/1.4")
    steps = dict(zip(sorted(log), (10, 20, 30, 30, 40, 30, 35), strict=True))
    log = {one: dataclasses.replace(manifest, step=steps[one]) for one, manifest in log.items()}

    def since(step: int, newest: str = "2.2") -> str:
        return " ".join(f"{one.epoch}.{one.sequence}" for one in find_since(version(newest), log.__getitem__, step))

    assert since(35) == "" and since(33) == "2.2" and since(30) == "2.2" and since(29) == "1.3 1.5 2.1 2.2"
    assert since(30, "1.4") == "" and since(25, "1.4") == "1.3" and since(10) == "1.2 1.3 1.5 2.1 2.2"
    with pytest.raises(ValueError, match=r"ends with 00000002-0000000002 at step 35, so .* what changed up to step 36"):
        since(36)
    with pytest.raises(ValueError, match=r"00000001-0000000001 starts anew at step 10, .* since step 9"):
        since(9)


@pytest.mark.parametrize("seed", range(150))
def test_every_reader_has_at_every_version_what_the_trainer_had(seed: int) -> None:
    rng = random.Random(seed)
    trainer = Trainer(rng, names_bases=seed % 3 == 0)
    readers: list[Reader] = []
    damaged: set[Version] = set()
    for _ in range(200):
        act = rng.choices(
            [trainer.step, trainer.delta, trainer.base, trainer.land, trainer.save, trainer.die], [8, 6, 0.7, 1, 0.5, 0.4]
        )[0]
        act()
        if rng.random() < 0.02:
            damaged.add(max(trainer.log))
        if rng.random() < 0.1:
            for one in sorted(trainer.log)[: rng.randrange(3)]:  # pruned
                if sum(trainer.log[v].kind == "base" and v > one for v in trainer.log) > 1:
                    del trainer.log[one]
        if rng.random() < 0.1:
            readers.append(Reader())
        for reader in readers:
            if rng.random() < 0.3:
                reader.catch_up(trainer, damaged, rng.randrange(1, 20))
    trainer.land()
    trainer.base()
    trainer.land()
    trainer.step()
    trainer.delta()
    for reader in readers:
        reader.catch_up(trainer, damaged, 10**6)
        assert reader.at == max(trainer.log) and reader.rows == trainer.rows
