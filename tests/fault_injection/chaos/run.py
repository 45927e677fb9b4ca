"""The chaos test's driver: runs the job undisturbed, runs it again among faults, and compares.

    sudo python -m tests.fault_injection.chaos.run --short|--long [--seed N] [--loopback] [--out FOLDER]

Prints each fault as it strikes and what came of it; ``FOLDER/chaos.json`` has the same and what was measured.
Exits 1 where anything was not as it must be. Without root or iproute2 all nodes are this machine, the network is
not cut and no disk is filled; that is said.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from data_pipeline.errors import Reject
from data_pipeline.index.build import build_index, save_index
from data_pipeline.pack.readers import read_folder
from data_pipeline.pack.writer import pack
from data_pipeline.storage.base import open_store
from data_pipeline.storage.dev_server import S3Server, running_server
from deco_scale.observability.events import REQUEUE
from deco_scale.yaml import dump_yaml
from tests.fault_injection.chaos import checks
from tests.fault_injection.chaos.cluster import Attempt, Cluster, Relay, small_disk
from tests.fault_injection.chaos.faults import KINDS, good_steps, saving
from tests.fault_injection.chaos.scenario import LONG, SHORT, Planned, Scenario, make_nans, make_plan
from tests.fault_injection.chaos.watch import Watch
from tests.support.assets import make_images_folder, make_text_encoder, tiny_config
from tests.support.namespaces import Nodes, why_not

END_S = 240.0
"""An attempt that must end does so before, and a job says something at least as often."""
START_S, IN_STEP_S, IN_SAVE_S = 12.0, 0.6, 0.3
"""How late a fault strikes at most, after a launch, a logged step, and the begin of a save."""
DISK_MB = 48
GRACE_S = 5.0
"""Beyond the watchdog's own time, until a hang is told."""
NETWORK_KINDS = ("network cut", "network cut for a moment")
DISK_KINDS = ("disk full during a save",)
NAN = "NaN in a gradient"
Say = Callable[[str], None]


class Finished(Exception):
    """The job ended by itself, with exit code 0."""


@dataclass
class Chaos:
    """A job among faults; see :class:`tests.fault_injection.chaos.faults.Scene`."""

    scenario: Scenario
    cluster: Cluster
    run_dir: Path
    server: S3Server
    watch: Watch
    random: random.Random
    say: Say
    keep_last: int
    problems: list[str] = field(default_factory=list)
    struck: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoints = self.run_dir / "checkpoints"
        self.began = time.monotonic()
        self._over = True
        self.attempt: Attempt
        self._launch()

    def run(self, plan: Sequence[Planned]) -> None:
        """Let all faults of the plan strike, and the job come to its end."""
        try:
            for number, planned in enumerate(plan, 1):
                self._reach(planned)
                self._strike(number, planned)
            while True:
                self.tick()
        except Finished:
            if missing := len(plan) - len(self.struck):
                self.problems.append(f"the job ended before {missing} of the faults")
        finally:
            self.cluster.kill(self.attempt)

    def tick(self) -> None:
        time.sleep(0.01)
        if self._over:
            self._launch()
        code = self.cluster.wait(self.attempt)
        if code is not None:
            self._close(code)
            if code == 0:
                raise Finished
        newest = max([self.attempt.began, *(at for at, _, _ in self.watch.lines[-1:])])
        assert time.monotonic() - newest < END_S, f"nothing was heard of attempt {self.attempt.number}"

    def await_end(self) -> int:
        began = time.monotonic()
        while (code := self.cluster.wait(self.attempt)) is None:
            time.sleep(0.01)
            assert time.monotonic() - began < END_S, f"attempt {self.attempt.number} did not end"
        self._close(code)
        if code == 0:
            raise Finished
        return code

    @property
    def trains(self) -> bool:
        """Whether the attempt runs and has done a step."""
        return not self._over and bool(self.watch.events("first_step", since=self.attempt.began))

    def _launch(self) -> None:
        newest = max(good_steps(self.checkpoints), default=0)
        self.attempt = self.cluster.start(len(self.attempts) + 1)
        self.attempts.append({"began": self.attempt.began, "from": newest})
        self._over = False

    def _reach(self, planned: Planned) -> None:
        ready = KINDS[planned.kind].ready
        while self._over or self.watch.done < planned.step or not self.cluster.ranks() or not ready(self):
            self.tick()
        if planned.moment == "start":
            until = self.attempt.began + self.random.uniform(0, START_S)
            while not self.trains and time.monotonic() < until:
                self.tick()
            return
        while not self.trains:
            self.tick()
        delay_s = self.random.uniform(0, IN_SAVE_S if planned.moment == "save" else IN_STEP_S)
        while planned.moment == "save" and not saving(self.checkpoints):
            self.tick()
        until = time.monotonic() + delay_s
        while time.monotonic() < until or self._over or not self.trains:
            self.tick()

    def _strike(self, number: int, planned: Planned) -> None:
        kind, struck = KINDS[planned.kind], self.attempt
        trained, in_save = self.trains, saving(self.checkpoints)
        fault = {"kind": kind.name, "moment": planned.moment, "attempt": struck.number, "step": self.watch.done}
        self.say(
            f"fault {number}: {kind.name}, {'in a save, ' if in_save else ''}"
            f"{'' if trained else 'before its first step, '}attempt {struck.number}, step {self.watch.done}"
        )
        at = time.monotonic()
        try:
            fault |= {
                "at_s": round(at - self.began, 1),
                "in_save": in_save,
                "trained": trained,
                **kind.strike(self),
            }
            if kind.ends and self.attempt is struck and not self._over:
                self.await_end()
        finally:
            ended = self.attempts[struck.number - 1]
            if "ended" in ended:
                fault |= {"code": ended["code"], "ended_after_s": round(ended["ended"] - at, 1)}
            self.struck.append(fault)
            self.say(f"    {', '.join(f'{k} {v}' for k, v in fault.items() if k not in ('kind', 'moment'))}")
        self._record_outcome(kind.name, fault, at, trained)

    def _record_outcome(self, name: str, fault: dict[str, Any], at: float, trained: bool) -> None:
        ends = KINDS[name].ends
        if ends is False and "code" in fault:
            self.problems.append(f"{name} ended the attempt: {fault}")
        if name == "SIGTERM of the job" and trained and fault["code"] != REQUEUE:
            self.problems.append(f"a job that was told to stop ended with {fault['code']}, not {REQUEUE}: {fault}")
        # One that is killed before the ranks have found each other is missed by its launcher alone.
        if not KINDS[name].loses or not (trained or name == "SIGSTOP of a rank"):
            return
        bound = GRACE_S + (self.scenario.timeout_s if trained else self.scenario.slow_timeout_s)
        told = [*self.watch.events("hang", since=at), *self.watch.events("lost_rank", since=at)]
        if not told or told[0][0] - at > bound or told[0][1]["rank"] != fault["rank"]:
            self.problems.append(f"a lost rank was not reported within {bound} s: {fault}, events {told}")
        else:
            fault["told_after_s"] = round(told[0][0] - at, 1)

    def _close(self, code: int) -> None:
        """Look at what an attempt has left."""
        trained = self.trains
        self._over = True
        left, seconds = self.cluster.leftovers(self.attempt)
        number, killed = self.attempt.number, bool(self.attempt.killed)
        self.attempts[-1] |= {"code": code, "ended": time.monotonic() - seconds, "gone_after_s": seconds}
        self.attempts[-1] |= {"killed": killed, "trained": trained, "done": self.watch.done}
        self.problems += [f"attempt {number} left {each}" for each in left]
        if code not in (0, REQUEUE) and code < 128:
            self.problems.append(f"attempt {number} ended with {code}: no scheduler would start it again")
        # Before the ranks have found each other only the scheduler knows that one is gone.
        if killed and trained:
            self.problems.append(f"attempt {number}: a node went on after another had failed, and was killed")
        told = {entry["step"] for _, entry in self.watch.events("checkpoint")}
        damaged = {fault["damaged"] for fault in self.struck if "damaged" in fault}
        self.problems += checks.lost_checkpoints(self.checkpoints, told, damaged, self.keep_last)
        self.say(f"    attempt {number} ended with {code} at step {self.watch.done}, gone after {seconds:.1f} s")


def make_shards(server: S3Server, folder: Path) -> str:
    """A data set in the server's bucket; its URL."""
    server.create_bucket("chaos")
    store, rejects = open_store("s3://chaos/shards"), list[Reject]()
    pack(read_folder(make_images_folder(folder, 100), rejects), store, shard_bytes=150_000, rejects=rejects)
    index, _ = build_index(store)
    assert not rejects and not index.problems
    save_index(store, index)
    return "s3://chaos/shards"


def write_config(scenario: Scenario, run: Path, url: str, encoder: Path, keep_last: int) -> Path:
    config = tiny_config(run, url, encoder)
    for stage, steps in zip(config["stages"], scenario.steps, strict=True):
        stage["steps"] = steps
        # One micro-batch a step on any number of ranks.
        stage["micro_batch"] = 2 if scenario.processes > 1 else 4
    config["checkpoint"] = {"every": scenario.every, "keep_last": keep_last}
    config["parallel"] = {"engine": "fsdp"}
    config["watchdog"] = {"timeout_s": scenario.timeout_s, "slow_timeout_s": scenario.slow_timeout_s}
    path = run.with_suffix(".yaml")
    path.write_text(dump_yaml(config))
    return path


@contextmanager
def surroundings(
    folder: Path, refused: str | None
) -> Iterator[tuple[Nodes | None, S3Server, dict[str, str], str]]:
    """The nodes, the S3 server with a data set, the variables by which nodes reach it, and the data set's URL."""
    with ExitStack() as stack:
        server = stack.enter_context(running_server(folder / "s3"))
        network = stack.enter_context(Nodes(2)) if refused is None else None
        variables = dict(server.environment)
        with mock.patch.dict(os.environ, variables):
            url = make_shards(server, folder / "pictures")
        if network is not None:
            relay = stack.enter_context(Relay(network.host, server.port))
            variables["AWS_ENDPOINT_URL_S3"] = f"http://{network.host}:{relay.port}"
        yield network, server, variables, url


def undisturbed(cluster: Cluster, say: Say) -> float:
    """Run the job once; seconds that it took."""
    attempt = cluster.start(1)
    try:
        while (code := cluster.wait(attempt)) is None:
            time.sleep(0.05)
            assert time.monotonic() - attempt.began < 3600, "the undisturbed run did not end"
        seconds = time.monotonic() - attempt.began
        left, _ = cluster.leftovers(attempt)
    finally:
        cluster.kill(attempt)
    logs = "".join(p.read_text()[-2000:] for p in sorted(cluster.folder.glob("attempt_*.log")))
    assert code == 0 and not left, f"the undisturbed run ended with {code}, left {left}:\n{logs}"
    say(f"undisturbed: {seconds:.0f} s")
    return seconds


def chaos(scenario: Scenario, seed: int, folder: Path, say: Say, *, loopback: bool = False) -> dict[str, Any]:
    """Both runs; what was measured, with what was wrong under ``problems``."""
    keep_last = 3
    refused = "--loopback" if loopback else why_not()
    with surroundings(folder, refused) as (network, server, variables, url), ExitStack() as stack:
        chance = random.Random(seed)
        encoder = make_text_encoder(folder / "encoder")
        nans = make_nans(scenario, chance, 2 * scenario.processes)
        clusters, runs = {}, {}
        for name in ("undisturbed", "disturbed"):
            runs[name] = folder / name
            config = write_config(scenario, runs[name], url, encoder, keep_last)
            clusters[name] = Cluster(
                folder / f"{name}.cluster", config, nodes=2, processes=scenario.processes, network=network,
                nan_steps=nans, variables=variables,
            )  # fmt: skip
        disk = small_disk(runs["disturbed"] / "checkpoints", DISK_MB)
        mounted = not loopback and stack.enter_context(disk)
        left_out = [*(NETWORK_KINDS if network is None else ()), *(() if mounted else DISK_KINDS)]
        plan = make_plan(scenario, [kind for kind in KINDS if kind not in left_out], chance)
        for kind in left_out:
            if kind in scenario.faults:
                say(f"NOT TRIED ({refused or 'a disk cannot be mounted here'}): {kind}")
        say(f"seed {seed}: {len(plan)} faults to strike, {NAN} at steps {list(nans)}")
        undisturbed(clusters["undisturbed"], say)
        with Watch(runs["disturbed"]) as watch:
            job = Chaos(scenario, clusters["disturbed"], runs["disturbed"], server, watch, chance, say, keep_last)
            job.run(plan)
        found = checks.everything(job, runs["undisturbed"], clusters["undisturbed"].samples, nans)
        return {"seed": seed, "left_out": left_out, "faults": len(job.struck) + len(nans), **found}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--short", action="store_const", const=SHORT, dest="scenario")
    size.add_argument("--long", action="store_const", const=LONG, dest="scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loopback", action="store_true", help="as where no namespaces and disks can be made")
    parser.add_argument("--out", type=Path, help="folder to keep; default: a temporary one")
    args = parser.parse_args(argv)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True)

    with ExitStack() as stack:
        folder = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        found = chaos(args.scenario, args.seed, folder, say, loopback=args.loopback)
        (folder / "chaos.json").write_text(json.dumps(found, indent=1))
    for line in checks.summary(found):
        print(line)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
