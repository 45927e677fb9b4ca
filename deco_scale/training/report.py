"""What a person sees of a run: a progress line, plain lines, ``metrics.jsonl``, wandb, curves as a PNG."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deco_scale.training.settings import WandbConfig
from deco_scale.watching.accounting import CLASSES
from deco_scale.watching.events import EVENTS, Event, append_event
from deco_scale.watching.folder import RunFolder
from deco_scale.watching.follow import JsonLines

METRICS, LOG, CURVES = "metrics.jsonl", "log.txt", "curves.png"


class Reporter:
    """Writes on rank 0 and is silent elsewhere."""

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        total_steps: int,
        wandb: WandbConfig,
        config: dict[str, Any],
        console: Console | None = None,
    ) -> None:
        self._folder, self._active, self._total = folder, active, total_steps
        self._console = console or Console()
        self._progress: Progress | None = None
        self._task: Any = None
        self._wandb: Any = None
        if not active:
            return
        self._log = (folder / LOG).open("a", encoding="utf-8")
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total_steps, shown="")
        if wandb.mode != "disabled":
            self._wandb = _start_wandb(folder, wandb, config)

    def say(self, message: str) -> None:
        """One plain line, on the console and in ``log.txt``."""
        if self._active:
            line = f"{time.strftime('%H:%M:%S')} {message}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._log.write(line + "\n")
            self._log.flush()

    def begin(self, **fields: Any) -> None:
        """The start of an attempt, numbered after those that the run's folder knows."""
        if self._active:
            events = JsonLines(self._folder / EVENTS).read()
            attempt = 1 + sum(e.get("kind") == "start" for e in events)
            self.event("start", attempt=attempt, **fields)

    def event(self, kind: str, **fields: Any) -> None:
        """One line of ``events.jsonl``; see :mod:`deco_scale.watching.events` for the kinds."""
        if self._active:
            append_event(self._folder, Event(time.time(), kind, fields))

    def metrics(self, values: dict[str, Any]) -> None:
        """One logged step."""
        if not self._active:
            return
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        remaining = (self._total - values["step"]) * values["step_s"]
        parts = " ".join(
            f"{name.removeprefix('loss_')} {values[name]:.4f}"
            for name in ("loss_flow", "loss_freq", "loss_repa")
            if values.get(name) is not None
        )
        shown = (
            f"loss {values['loss']:.4f} | {values['images_per_s']:.1f} images/s | "
            f"data wait {1000 * values['data_wait_s']:.0f} ms | norm {values['grad_norm']:.2f} | {parts}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=values["step"], shown=shown)
            self._log.write(f"step {values['step']} {shown}\n")
            self._log.flush()
        else:
            self.say(f"step {values['step']}/{self._total} {shown} | ETA {_duration(remaining)}")
        if self._wandb is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self._wandb.log(numbers, step=values["step"])

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Scores of an evaluation, as a line of its own with names that begin with ``eval.``."""
        if not self._active or not scores:
            return
        named = {f"eval.{name}": value for name, value in scores.items()}
        self._metrics.write(json.dumps({"step": step, **named}) + "\n")
        self._metrics.flush()
        self.say(f"step {step} evaluation: " + ", ".join(f"{n} {v:.4f}" for n, v in scores.items()))
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Tell of a picture that was written."""
        self.say(f"{name}: {path}")
        if self._active and self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Draw the curves and end what runs."""
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        self._goodput()
        entries = read_metrics(self._folder)
        if entries:
            draw_curves(entries, self._folder / CURVES)
            self.say(f"loss curves: {self._folder / CURVES}")
        if self._wandb is not None:
            self._wandb.finish()
        self._log.close()
        self._metrics.close()

    def _goodput(self) -> None:
        """Say where the run's time has gone, all attempts together; the last line of ``metrics.jsonl``."""
        run = RunFolder(self._folder)
        run.refresh()
        found = run.accounting(time.time())
        if found is None:
            return
        self._metrics.write(json.dumps(found.named()) + "\n")
        parts = [f"{name} {found.seconds(name):.0f} s" for name in CLASSES if found.seconds(name) >= 0.5]
        self.say(
            f"of {found.wall_s:.0f} s in {len(found.attempts)} attempt(s): {', '.join(parts)}; "
            f"effective training time {found.effective:.1%}"
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Logged steps in order, evaluations aside; one that was done again after a resume counts as last done."""
    path = folder / METRICS
    by_step: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line cut off by a kill; the step is done again
            if "loss" in entry:
                by_step[entry["step"]] = entry
    return [by_step[step] for step in sorted(by_step)]


def draw_curves(entries: list[dict[str, Any]], path: Path) -> None:
    """Losses, gradient norm and throughput over steps."""
    from matplotlib.figure import Figure

    steps = [e["step"] for e in entries]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    losses, norm, speed = figure.subplots(1, 3)
    for name in ("loss", "loss_flow", "loss_freq", "loss_repa"):
        if any(e.get(name) is not None for e in entries):
            losses.plot(steps, [e.get(name) for e in entries], label=name, linewidth=1)
    losses.set(title="loss", xlabel="step", yscale="log")
    losses.legend()
    norm.plot(steps, [e["grad_norm"] for e in entries], linewidth=1)
    norm.set(title="gradient norm", xlabel="step", yscale="log")
    speed.plot(steps, [e["images_per_s"] for e in entries], linewidth=1)
    speed.set(title="images/s", xlabel="step", ylim=(0, None))
    figure.savefig(path, dpi=110)


def _start_wandb(folder: Path, cfg: WandbConfig, config: dict[str, Any]) -> Any:
    import wandb

    mode = cfg.mode
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(project=cfg.project, name=cfg.name, dir=folder, mode=mode, config=config, resume="allow")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
