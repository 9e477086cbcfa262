"""Kills trainer and server at random moments; both must end with the same rows: `python -m launch.bench.kill_serving --help`.

The quickstart, shortened, with tables that forget ids, trains and publishes float32; a server process follows it. Again and
again one of the two, drawn by lot, is killed with SIGKILL at a moment drawn from its time of training or serving, and started
again. When the trainer has ended, three must hold the same ids and the same vectors in every table, bit for bit: the trainer's
last snapshot, the server that was there, and a server started anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench import follower, kill

EXAMPLE = "example: python -m launch.bench.kill_serving --workdir /tmp/kill_serving --kills 50"
OVERRIDES = kill.OVERRIDES | {
    "TableConfig.ttl_s": 60,
    "Experiment.publisher": "@PublisherConfig()",
    "PublisherConfig.format": "float32",
    "PublisherConfig.period_s": 0.1,
}
"""Small tables whose ids expire a minute of event time after they were last seen: most come and go all the time."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.kill_serving",
        description="Kills a trainer that publishes and a server that follows it; compares their rows in the end.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs; its subfolders are replaced")
    parser.add_argument("--kills", type=int, default=50, help="in all rounds together (default: %(default)s)")
    parser.add_argument("--kills_a_round", type=int, default=10, help="at the most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="steps of a round (default: %(default)s)")
    parser.add_argument(
        "--within_s", type=float, default=1.5, help="a kill comes that soon, at the most (default: %(default)s)"
    )
    parser.add_argument("--most_s", type=float, default=float("inf"), help="no new round after that (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of victims and moments (default: %(default)s)")
    return parser.parse_args(argv)


class Round:
    """A trainer and a server in a run folder."""

    def __init__(self, run: Path, cache: Path, steps: int) -> None:
        """Starts both."""
        self._run, self._cache, self._steps = run, cache, steps
        shutil.rmtree(run, ignore_errors=True)
        self.trainer_kills = self.server_kills = 0
        self._train()
        follower.keep_config(run, self._trainer)
        self._serve()

    def _train(self) -> None:
        (self._run / "config.gin").unlink(missing_ok=True)
        overrides = OVERRIDES | {"TrainConfig.steps": self._steps}
        self._trainer = kill.start_run(self._run, "configs/quickstart.gin", overrides, self._cache)

    def _serve(self) -> None:
        self._server = follower.start(self._run, "lived", self._cache)

    def kill_one(self, trainer: bool, after_s: float) -> bool:
        """Kills one of the two that long after it began to train or serve, and starts it again.

        Returns:
            False if the trainer had ended before, so that the round is over.
        """
        if trainer:
            kill.wait_for_training(self._trainer, self._run)
        while not trainer and not self._server.is_ready and self._trainer.poll() is None:
            if self._server.process.poll() is not None:
                follower.wait_ready(self._server)
            time.sleep(0.01)
        time.sleep(after_s)
        if self._trainer.poll() is not None:
            return False
        victim = self._trainer if trainer else self._server.process
        victim.kill()
        victim.communicate()
        if trainer:
            self.trainer_kills += 1
            self._train()
        else:
            self.server_kills += 1
            self._serve()
        return True

    def end(self) -> tuple[dict[str, Any], list[str]]:
        """Lets the trainer end; returns what the server tells that was there, and how servers and trainer differ."""
        kill.finish(self._trainer)
        told, lived = follower.stop(self._server)
        told_anew, anew = follower.stop(follower.start(self._run, "anew", self._cache))
        step, live = follower.rows_of_snapshot(self._run)
        found = [f"{who} is at step {one['step']}, the snapshot at {step}" for who, one in
                 (("the server", told), ("a new server", told_anew)) if one["step"] != step]  # fmt: skip
        found += [f"server: {line}" for line in follower.differences(lived, live)]
        found += [f"new server: {line}" for line in follower.differences(anew, live)]
        return told | {"rows": sum(rows.ids.size for rows in live.values())}, found

    def close(self) -> None:
        """Ends what still runs."""
        for process in (self._trainer, self._server.process):
            if process.poll() is None:
                process.kill()
                process.communicate()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 if all were equal in every round."""
    asked = _parsed(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    workdir, rng, began = asked.workdir.absolute(), random.Random(asked.seed), time.monotonic()
    kills = trainer_kills = rounds = equal = deleted = faults = 0
    print(f"{'round':>5}{'trainer':>9}{'server':>8}{'rows':>9}{'deleted':>9}{'faults':>8}{'equal':>7}{'elapsed':>10}")
    while kills < asked.kills and time.monotonic() - began < asked.most_s:
        one = Round(workdir / "run", workdir / "xla", asked.steps)
        try:
            for _ in range(min(asked.kills_a_round, asked.kills - kills)):
                if not one.kill_one(rng.random() < 0.5, rng.random() * asked.within_s):
                    break
            told, found = one.end()
        finally:
            one.close()
        rounds, equal = rounds + 1, equal + (not found)
        kills += one.trainer_kills + one.server_kills
        trainer_kills += one.trainer_kills
        deleted, faults = deleted + told["applied_deleted"], faults + told["faults"]
        row = f"{rounds:>5}{one.trainer_kills:>9}{one.server_kills:>8}{told['rows']:>9,}{told['applied_deleted']:>9,}"
        print(f"{row}{told['faults']:>8}{'no' if found else 'yes':>7}{time.monotonic() - began:>8.0f} s", flush=True)
        for line in found[:8]:
            print(f"      {line}")
        if told["faults"]:
            print(f"      last fault: {told['last_fault']}")
    summary = {"kills": kills, "trainer_kills": trainer_kills, "server_kills": kills - trainer_kills, "rounds": rounds}
    print(json.dumps(summary | {"equal": equal, "deleted": deleted, "faults": faults, "steps": asked.steps}))
    return 0 if equal == rounds and rounds else 1


if __name__ == "__main__":
    sys.exit(main())
