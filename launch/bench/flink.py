"""How soon and how fast Flink brings changes and events to the lake, and what is lost or doubled when its processes are killed.

Apache Kafka, PostgreSQL and a Flink cluster run on this machine; events and profiles come all the while. At random moments the
TaskManager, the JobManager or both get SIGKILL and are started again: the jobs go on from their last checkpoints. In the end
`events`, the logs of features and the counts of windows are compared with what was written to the log and the database.

    python -m launch.bench.flink [--kills 20] [--events 100000] [--seed 0] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench import kafka_broker, postgres_server
from launch.bench.flink_events import BEGIN_MS, OUT_OF_ORDER_MS, Event, counts_in, counts_of, last_events, make_events
from launch.bench.flink_lake import FlinkLake, until
from launch.flink import local
from monolith_jax.lake.changelog import Changelog

_CHUNK_MS, _CHUNK_EVENTS, _PAUSE_S = 60_000, 20, 0.25
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
_USER = 1
WHAT = (("taskmanager",), ("jobmanager",), ("taskmanager", "jobmanager"))


class Traffic(threading.Thread):
    """Writes events to the log and changes to the database until it is told to stop."""

    def __init__(self, lake: FlinkLake, seed: int) -> None:
        """Writes nothing yet."""
        super().__init__(daemon=True)
        self._lake, self._seed, self._ending = lake, seed, threading.Event()
        self.num_changes = 0

    def run(self) -> None:
        """Writes a minute of events at a time."""
        chunk, waiting = 0, []
        while not self._ending.is_set():
            begin_ms = BEGIN_MS + chunk * _CHUNK_MS
            impressions, actions = make_events(_CHUNK_EVENTS, self._seed + chunk, begin_ms, _CHUNK_MS, chunk * _CHUNK_EVENTS)
            # Those that are later than the next minute's wait for it: the log is in the order of times.
            actions = sorted([*waiting, *actions], key=lambda one: one["event_time_ms"])
            due = [one for one in actions if one["event_time_ms"] < begin_ms + _CHUNK_MS]
            waiting = actions[len(due) :]
            self._lake.produce(impressions, due)
            self._lake.write_postgres(f"UPDATE user_profiles SET age = {self.num_changes + 1} WHERE user_id = {_USER}")
            self.num_changes += 1
            chunk += 1
            self._ending.wait(_PAUSE_S)
        self._lake.produce([], waiting)

    def end(self) -> None:
        """Stops it."""
        self._ending.set()
        self.join()


def write_last(lake: FlinkLake) -> int:
    """Writes events that make all windows fire, and returns the watermark."""
    last_ms = max(one["event_time_ms"] for one in [*lake.impressions, *lake.actions]) + 2 * DAY_MS
    lake.produce(*last_events(last_ms))
    return last_ms - OUT_OF_ORDER_MS


def throughput(lake: FlinkLake, number: int, seed: int) -> float:
    """Writes events from before those of the traffic, and returns how many a second come to `events` and the features."""
    begin_ms = BEGIN_MS - 3 * HOUR_MS
    impressions, actions = make_events(number, seed, begin_ms, HOUR_MS, 10**8)
    began = time.monotonic()
    lake.produce(impressions, actions)
    total = len(impressions) + len(actions)
    until(lambda: lake.num_rows("events") >= total and lake.num_rows("user_features_log") >= len(impressions), 300)
    return total / (time.monotonic() - began)


def peak_mb(pid: int) -> int:
    """Returns the most memory that a process has had."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def latencies(lake: FlinkLake, number: int, rng: random.Random) -> list[float]:
    """Returns seconds from a change in PostgreSQL to its row at a follower of `user_features`."""
    follower, found = Changelog(lake.warehouse, "user_features"), []
    for age in range(1000, 1000 + number):
        time.sleep(rng.random())
        lake.write_postgres(f"UPDATE user_profiles SET age = {age} WHERE user_id = {_USER}")
        begin = time.monotonic()
        until(lambda wanted=age: any(row["age"] == wanted for row in follower.poll().rows.to_pylist()))
        found.append(time.monotonic() - begin)
    return found


def kill(lake: FlinkLake, names: Sequence[str]) -> None:
    """Kills processes, and starts them and the jobs again."""
    for name in names:
        lake.cluster.kill(name)
    if "jobmanager" in names:
        lake.cluster.start_jobmanager()
    if "taskmanager" in names:
        lake.cluster.start_taskmanager()
    if "jobmanager" in names:
        lake.resume()


def event_faults(lake: FlinkLake, watermark_ms: int) -> list[str]:
    """Returns what is lost, doubled or wrong of the events and of what is counted, once the lake has had the time to follow."""
    expected = counts_of(lake.impressions, lake.actions, watermark_ms)
    wrong = []
    try:
        until(lambda: len(counts_in(lake.read("video_features_log"))) >= len(expected), 120)
        if counts_in(lake.read("video_features_log")) != expected:
            wrong.append("counts of windows are wrong")
    except (AssertionError, ValueError) as fault:
        wrong.append(f"counts of windows: {fault}")
    lake.settled()
    events, log = lake.read("events"), lake.read("user_features_log")
    for topic, rows in (("impressions", lake.impressions), ("actions", lake.actions)):
        told = Counter(_row(one) for one in events if one["topic"] == topic)
        wrong += _differences(topic, Counter(_row(one) for one in rows), told)
    places = Counter((one["topic"], one["log_partition"], one["log_offset"]) for one in events)
    wrong += [f"{place} is there {often} times" for place, often in places.items() if often > 1]
    shown = Counter((one["user_id"], one["activity_ms"]) for one in log if one["activity_ms"] is not None)
    wrong += _differences("activity", Counter((one["user_id"], one["event_time_ms"]) for one in lake.impressions), shown)
    return wrong


def profile_faults(lake: FlinkLake, num_changes: int, since_ms: int) -> list[str]:
    """Returns what is wrong with the changes of the profile, which are later than a time."""
    wrong, log = [], lake.read("user_features_log")
    ages = [one for one in log if one["user_id"] == _USER and (one["profile_ms"] or 0) > since_ms]
    ages.sort(key=lambda one: one["profile_ms"])
    if [one["age"] for one in ages] != [*range(1, num_changes + 1)]:
        wrong.append(f"changes of the profile: {len(ages)} of {num_changes}, or out of order")
    (user,) = (one for one in lake.read("user_features") if one["user_id"] == _USER)
    if user["age"] != num_changes:
        wrong.append(f"the profile is that of change {user['age']} of {num_changes}")
    return wrong


def _row(event: Event) -> tuple[Any, ...]:
    names = ("event_time_ms", "user_id", "video_id", "request_id", "duration_ms", "action", "value")
    return tuple(event.get(name) for name in names)


def _differences(what: str, wanted: Counter[Any], found: Counter[Any]) -> list[str]:
    lost, doubled = (wanted - found).total(), (found - wanted).total()
    return [f"{what}: {lost} lost, {doubled} too many"] if lost or doubled else []


def run(folder: Path, kills: int, num_events: int, seed: int) -> dict[str, Any]:
    """Returns the figures."""
    rng = random.Random(seed)
    lake = FlinkLake(folder)
    try:
        lake.write_postgres(f"INSERT INTO user_profiles VALUES ({_USER}, 'de', 'en', 0)")
        lake.submit()
        until(lambda: lake.read("user_features"))
        waited = latencies(lake, 20, rng)
        print(
            f"PostgreSQL to a follower of user_features: median {statistics.median(waited):.2f} s, longest {max(waited):.2f} s"
        )
        since_ms = int(time.time() * 1000)
        traffic = Traffic(lake, seed)
        rate = throughput(lake, num_events // 2, seed)
        memory = {name: peak_mb(lake.cluster.pid(name)) for name in ("jobmanager", "taskmanager")}
        print(f"Kafka to events and features, three jobs: {rate:,.0f} events/s; memory so far, MB: {memory}", flush=True)
        began = time.monotonic()
        traffic.start()
        done: Counter[str] = Counter()
        for _ in range(kills):
            time.sleep(rng.uniform(0.5, 6))
            names = rng.choice(WHAT)
            kill(lake, names)
            done[" and ".join(names)] += 1
            print(f"{time.monotonic() - began:6.1f} s  killed {' and '.join(names)}", flush=True)
        traffic.end()
        wrong = event_faults(lake, write_last(lake)) + profile_faults(lake, traffic.num_changes, since_ms)
        number = len(lake.impressions) + len(lake.actions)
        print(f"{number} events, {traffic.num_changes} changes of a profile; {wrong or 'all right'}")
    finally:
        lake.stop()
    return {
        "postgres_to_follower_s": round(statistics.median(waited), 2),
        "postgres_to_follower_max_s": round(max(waited), 2),
        "events_per_s": round(rate),
        "peak_mb": memory,
        "kills": dict(done),
        "events": number,
        "faults": wrong,
    }


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if why := local.missing() or kafka_broker.missing() or postgres_server.missing():
        raise SystemExit(why)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(arguments.folder or Path(folder), arguments.kills, arguments.events, arguments.seed)))


if __name__ == "__main__":
    main()
