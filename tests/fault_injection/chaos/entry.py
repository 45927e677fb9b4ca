"""What the chaos test starts in place of ``launcher/train.py``: the same program, watched and poisoned.

It runs launcher/train.py as ``python launcher/train.py`` does, after two changes to what it puts together. Each
step that is done adds a line to ``samples_rank_K.jsonl`` in the folder CHAOS_SAMPLES: attempt, step, the numbers
of the samples and a checksum of each one's image and caption. At the steps of CHAOS_NAN (a JSON object of step:
rank) that rank's part of the gradient becomes NaN before the update.
"""

import dataclasses
import json
import os
import runpy
import sys
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from deco_scale.training.callbacks import Callback  # noqa: E402


class Recorded:
    """The inputs' preparation, noting which samples it was given since the last step."""

    def __init__(self, prepare: Any) -> None:
        self._prepare = prepare
        self.sample_ids: list[int] = []
        self.sums: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prepare, name)

    def __call__(self, batch: Any, *more: Any, **named: Any) -> Any:
        self.sample_ids += [int(number) for number in batch.sample_ids]
        images = [zlib.crc32(bytes(memoryview(image).cast("B"))) for image in batch.images]
        self.sums += [zlib.crc32(c.encode(), s) for c, s in zip(batch.captions, images, strict=True)]
        return self._prepare(batch, *more, **named)

    def take(self) -> dict[str, list[int]]:
        taken = {"numbers": self.sample_ids, "sums": self.sums}
        self.sample_ids, self.sums = [], []
        return taken


def watched(trainer: Any) -> Any:
    """The trainer with its steps recorded and its gradients poisoned as the environment says."""
    rank = int(os.environ["RANK"])
    folder = Path(os.environ["CHAOS_SAMPLES"])
    file = os.open(folder / f"samples_rank_{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    poisoned = {int(step) for step, victim in json.loads(os.environ["CHAOS_NAN"]).items() if victim == rank}
    recorded, update = Recorded(trainer.build_inputs), trainer.engine.update
    batch = trainer.stages[0].cfg.global_batch

    class Record(Callback):
        def on_update_end(self, trainer: Any, step: int) -> None:
            line = {"attempt": int(os.environ["CHAOS_ATTEMPT"]), "step": step, **recorded.take()}
            os.write(file, json.dumps(line).encode() + b"\n")

    def poison(*arguments: Any, **named: Any) -> Any:
        # All stages have the same global batch; the first sample's number tells the step.
        if recorded.sample_ids[0] // batch + 1 in poisoned:
            for parameter in trainer.engine._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.to_local().fill_(float("nan"))
        return update(*arguments, **named)

    trainer.engine.update = poison
    # The record of a step comes before what may end the run at it.
    return dataclasses.replace(trainer, build_inputs=recorded, callbacks=[Record(), *trainer.callbacks])


def main() -> None:
    import launcher.build.trainer

    build = launcher.build.trainer.build_trainer

    def build_watched(*arguments: Any, **named: Any) -> Any:
        trainer, run_logger = build(*arguments, **named)
        return watched(trainer), run_logger

    launcher.build.trainer.build_trainer = build_watched
    runpy.run_path(str(ROOT / "launcher" / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
