"""What must hold of a run that met faults, compared with the same run undisturbed."""

import contextlib
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints_tools.cli import main as verify_checkpoint
from deco_scale.cli.simulate import measured_seconds
from deco_scale.observability.goodput import CLASSES, Goodput
from deco_scale.observability.run_dir import RunDir
from deco_scale.planning.goodput_sim import Faults, expected_s, segments_of, simulate
from tests.fault_injection.chaos.faults import complete_steps, folder_of, is_good

if TYPE_CHECKING:
    from tests.fault_injection.chaos.run import Chaos

TOLERANCE = 1e-5
"""Relative, of loss and gradient norm; in the same layout they should be equal to the bit."""
CLOCK = 0.02
MODEL = 0.15
"""How far one run may lie from the model's mean over many: its faults strike by a plan, not at one rate, some lose
nothing (a signal to stop) and some an interval and more (in a save)."""

MODEL_FAULTS = 10
"""Fewer faults say little of a mean: the numbers are printed and not checked."""


def everything(job: "Chaos", wanted: Path, wanted_samples: Path, nans: Mapping[int, int]) -> dict[str, Any]:
    """All checks of the run's end; ``problems`` has what is wrong, in words."""
    steps, batch = job.scenario.total_steps, 8
    problems = list(job.problems)
    trace = compare_traces(job.run_dir, wanted, steps, set(nans))
    samples = compare_samples(job.cluster.samples, wanted_samples, steps, batch, job.attempts)
    problems += trace.pop("problems") + samples.pop("problems") + verified(job.checkpoints)
    skips = {entry["step"] for _, entry in job.watch.events("skip")}
    if skips != set(nans):
        problems.append(f"skipped steps are told as {sorted(skips)}, planted were {sorted(nans)}")
    clocks = compare_clocks(job)
    model = compare_model(
        RunDir(job.run_dir).refresh(), every=job.scenario.every, total_steps=job.scenario.total_steps
    )
    problems += clocks.pop("problems") + model.pop("problems")
    return {
        "problems": problems, "trace": trace, "samples": samples, "clocks": clocks, "model": model,
        "struck": job.struck, "attempts": job.attempts,
    }  # fmt: skip


def compare_traces(found: Path, wanted: Path, steps: int, nans: Set[int]) -> dict[str, Any]:
    """Loss and gradient norm of each step's last execution; steps with a NaN are left out by both runs."""
    ours, theirs = ({e["step"]: e for e in RunDir(run).refresh().steps()} for run in (found, wanted))
    problems, worst, equal = [], 0.0, 0
    for name, entries in (("disturbed", ours), ("undisturbed", theirs)):
        if sorted(entries) != list(range(1, steps + 1)):
            problems.append(f"the {name} run has logged {len(entries)} of {steps} steps")
        odd = {step for step, e in entries.items() if not math.isfinite(e["grad_norm"])}
        if odd != nans:
            problems.append(f"the {name} run has bad steps {sorted(odd)}, planted were {sorted(nans)}")
    for step in sorted(ours.keys() & theirs.keys()):
        pairs = [(ours[step][name], theirs[step][name]) for name in ("loss", "grad_norm")]
        differences = [abs(a - b) / abs(b) for a, b in pairs if not (math.isnan(a) and math.isnan(b))]
        worst = max([worst, *(math.inf if math.isnan(d) else d for d in differences)])
        equal += not any(differences)
    if worst > TOLERANCE:
        problems.append(f"the loss traces differ by {worst:.1e}")
    return {"problems": problems, "worst": worst, "equal_steps": equal, "steps": len(ours)}


def compare_samples(
    found: Path, wanted: Path, steps: int, batch: int, attempts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Each sample of the last execution of each step, once; replays only of what was not saved."""
    last, executed = _last_executions(found)
    undisturbed, _ = _last_executions(wanted)
    problems = []
    for step in range(1, steps + 1):
        numbers = sorted(number for number, _ in last[step])
        if numbers != list(range((step - 1) * batch, step * batch)):
            problems.append(f"step {step} was trained on the samples {numbers}")
        elif sorted(last[step]) != sorted(undisturbed[step]):
            problems.append(f"step {step} saw other images or captions than in the undisturbed run")
    replays = 0
    for (attempt, rank), done in sorted(executed.items()):
        begin = attempts[attempt - 1]["from"]
        if done != list(range(begin + 1, begin + 1 + len(done))):
            problems.append(f"attempt {attempt}, rank {rank}: from step {begin} it did {done[:3]}..{done[-1:]}")
        if rank == 0:
            replays += len(done)
    return {"problems": problems[:20], "executed": replays, "replayed": replays - steps}


def _last_executions(
    folder: Path,
) -> tuple[dict[int, list[tuple[int, int]]], dict[tuple[int, int], list[int]]]:
    """Samples (number, checksum) of each step by the last attempt that did it; steps by attempt and rank."""
    newest: dict[int, int] = defaultdict(int)
    samples: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    executed: dict[tuple[int, int], list[int]] = defaultdict(list)
    for file in sorted(folder.glob("samples_rank_*.jsonl")):
        rank = int(file.stem.rpartition("_")[2])
        for line in map(json.loads, file.read_text().splitlines()):
            step, attempt = line["step"], line["attempt"]
            newest[step] = max(newest[step], attempt)
            samples[step, attempt] += zip(line["numbers"], line["sums"], strict=True)
            executed[attempt, rank].append(step)
    return defaultdict(list, {step: samples[step, newest[step]] for step in newest}), executed


def lost_checkpoints(folder: Path, told: set[int], damaged: set[int], keep_last: int) -> list[str]:
    """Of what is there or was told to be complete, the last ``keep_last`` must be there and good."""
    there = set(complete_steps(folder))
    damaged = {step for step in damaged if not is_good(folder, step)}
    due = sorted(there | told)[-keep_last:]
    return [
        f"the checkpoint of step {step} was complete and is {'damaged' if step in there else 'gone'}"
        for step in due
        if step not in damaged and not is_good(folder, step)
    ]


def verified(folder: Path) -> list[str]:
    """What ``deco-ckpt verify`` has against the checkpoints that are there."""
    problems = []
    for step in complete_steps(folder):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = verify_checkpoint(["verify", str(folder_of(folder, step))])
        if code:
            problems.append(f"deco-ckpt verify {step}: {said.getvalue().strip()}")
    return problems


def compare_clocks(job: "Chaos") -> dict[str, Any]:
    """The accounting against this process's own clock."""
    accounting = _accounting(job)
    starts, ends = job.watch.events("start"), job.watch.events("end")
    wall_s = ends[-1][0] - starts[0][0]
    down_s, total_s = job.watch.down_s(), sum(accounting.seconds(name) for name in CLASSES)
    problems = []
    if abs(total_s - wall_s) > CLOCK * wall_s:
        problems.append(f"the accounting's classes add up to {total_s:.1f} s, the clock says {wall_s:.1f} s")
    accounted = accounting.seconds("down")
    if abs(accounted - down_s) > CLOCK * wall_s:
        problems.append(f"down for {accounted:.1f} s by the accounting, {down_s:.1f} s by the clock")
    return {
        "problems": problems, "wall_s": wall_s, "accounted_s": total_s, "down_s": down_s,
        "classes": {name: accounting.seconds(name) for name in CLASSES}, "effective": accounting.effective,
    }  # fmt: skip


def _accounting(job: "Chaos") -> Goodput:
    folder = RunDir(job.run_dir)
    folder.refresh()
    found = folder.goodput(time.time())
    assert found is not None and not folder.problems, folder.problems
    return found


def compare_model(folder: RunDir, *, every: int, total_steps: int) -> dict[str, Any]:
    """A run's wall clock against the model of ``deco plan --simulate``, fed with what the run's files say.

    The model's faults strike at any time; here they strike while the job trains, and those that strike a start
    make that restart longer. So the model without restarts says how long the job trains, from the first step of
    each attempt to its last sign of life, and with that how many faults it meets; each costs a mean restart.
    """
    accounting = folder.goodput(max(event.time for event in folder.events))
    assert accounting is not None
    trained = [attempt for attempt in accounting.attempts if attempt.to_step is not None]
    firsts = [event.time for event in folder.events if event.kind == "first_step"]
    begins = [min(time for time in firsts if time >= attempt.start) for attempt in trained]
    up_s = sum(attempt.last_active - begin for attempt, begin in zip(trained, begins, strict=True))
    met = len(trained) - 1
    work_s = accounting.seconds("step") + accounting.seconds("data_wait")
    measured = measured_seconds(folder)
    faults = Faults(
        mtbf_s=up_s / met, checkpoint_s=measured["checkpoint_s"], stall_s=measured["stall_s"], restart_s=0.0
    )
    segments = segments_of(work_s, work_s * every / total_steps)
    expected, played = expected_s(faults, work_s, segments), simulate(faults, work_s, segments, runs=2000, seed=0)
    assert played is not None
    first_start_s = begins[0] - accounting.attempts[0].start
    whole = first_start_s + expected + expected / faults.mtbf_s * measured["restart_s"]
    problems = [
        f"{what}: {model:.0f} s by the model, measured are {clock:.0f} s"
        for what, model, clock in (("training", expected, up_s), ("the whole run", whole, accounting.wall_s))
        if met >= MODEL_FAULTS and abs(model - clock) > MODEL * clock
    ]
    if abs(played.mean_s - expected) > 5 * played.error_s:
        problems.append(
            f"simulated {played.mean_s:.0f} +- {played.error_s:.1f} s, by the closed form {expected:.0f} s"
        )
    return {
        "problems": problems, "work_s": work_s, "mtbf_s": faults.mtbf_s, "met": met, **measured,
        "trained_s": up_s, "expected_training_s": expected, "simulated_s": played.mean_s,
        "simulated_error_s": played.error_s, "wall_s": accounting.wall_s, "expected_wall_s": whole,
    }  # fmt: skip


def summary(found: Mapping[str, Any]) -> list[str]:
    """The result in lines for a person."""
    clocks, model, trace, samples = (found[name] for name in ("clocks", "model", "trace", "samples"))
    classes = ", ".join(f"{name} {seconds:.1f}" for name, seconds in clocks["classes"].items())
    gone = max(attempt["gone_after_s"] for attempt in found["attempts"])
    lines = [
        f"{found['faults']} faults, {len(found['attempts'])} attempts, seed {found['seed']}",
        f"loss trace: {trace['equal_steps']} of {trace['steps']} steps bit-equal, worst {trace['worst']:.1e}",
        f"samples: {samples['executed']} steps done, {samples['replayed']} of them again",
        f"seconds: {classes}; together {clocks['accounted_s']:.1f}, by the clock {clocks['wall_s']:.1f}; down by "
        f"the clock {clocks['down_s']:.1f}",
        f"effective training time {clocks['effective']:.1%}",
        f"model: work {model['work_s']:.0f} s, {model['mtbf_s']:.1f} s between faults, restart "
        f"{model['restart_s']:.1f} s, save {model['checkpoint_s']:.2f} s, stall {model['stall_s']:.3f} s",
        f"training takes {model['expected_training_s']:.0f} s by the model, {model['simulated_s']:.0f} +- "
        f"{model['simulated_error_s']:.1f} s simulated, {model['trained_s']:.0f} s measured; the whole run "
        f"{model['expected_wall_s']:.0f} s, measured {model['wall_s']:.0f} s",
        f"processes and ports were gone at most {gone:.1f} s after an attempt's end",
    ]
    return [*lines, *(f"PROBLEM: {problem}" for problem in found["problems"])]
