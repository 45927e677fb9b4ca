"""A run with ``precision.compute: fp8`` through the launcher's own code, emulated on a CPU."""

from pathlib import Path
from typing import Any

from tests.support.assets import tiny_config
from tests.support.process_groups import Job, run_jobs, trace


def test_a_run_in_emulated_fp8_says_what_is_fp8_and_resumes(
    tmp_path: Path, shards: Path, text_encoder: Path
) -> None:
    def config(name: str, precision: dict[str, Any], until: int | None = None) -> dict[str, Any]:
        made = tiny_config(tmp_path / name, shards, text_encoder)
        # FP8 takes multiples of 16 tokens: 8 images of 4 patches and 6 words.
        made["stages"] = [made["stages"][1] | {"micro_batch": 8, "steps": 6}]
        made["run"] |= {"stop_at_step": until}
        return made | {"precision": precision, "checkpoint": {"every": 3, "keep_last": 2}}

    fp8 = {"compute": "fp8", "fp8_emulate": True}
    jobs = [
        Job("fp8", config("fp8", fp8)),
        Job("bf16", config("bf16", {"compute": "bf16"})),
        Job("broken", config("broken", fp8, until=3)),
        Job("broken again", config("broken", fp8), resume="auto"),
    ]
    run_jobs(jobs, 1, tmp_path)
    found, plain, resumed = (trace(tmp_path / name) for name in ("fp8", "bf16", "broken"))
    assert resumed == found and found != plain
    for step, (loss, _) in found.items():
        # e4m3 keeps 4 bits: a few per cent of error in each product, much less in a mean over pixels.
        assert abs(loss - plain[step][0]) < 0.05 * plain[step][0]
    log = (tmp_path / "fp8" / "log.txt").read_text()
    assert "FP8" in log and "emulated" in log
