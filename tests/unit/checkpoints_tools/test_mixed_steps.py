"""Files of two saves are never taken for one: whichever file of a DeepSpeed checkpoint is of another step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.formats.canonical import CanonicalReader
from checkpoints_tools.formats.zero.reader import ZeroReader
from checkpoints_tools.formats.zero.writer import ZeroLayout
from checkpoints_tools.registry import open_checkpoint
from checkpoints_tools.reshard import plan_reshard
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig
from tests.support.checkpoints import META, save, tensors_of

TAG = "global_step7"
MODEL = ModelConfig(kind="c2i_baseline", dim=24, num_heads=2, num_blocks=1, patch_size=8, num_classes=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint, of step 7 with 7 updates, as universal, ZeRO-1 and ZeRO-3 folders."""
    root = tmp_path_factory.mktemp("written")
    tensors = tensors_of(MODEL, encoder_dim=0)
    for kind in ("exp_avg", "exp_avg_sq"):
        tensors |= {n.replace("model.", f"{kind}.", 1): t for n, t in tensors.items() if n.startswith("model.")}
    source = CanonicalReader(save(root / "canonical", tensors))
    plan_reshard(source, to="universal").write(root / "universal", lambda name: None)
    for stage in (1, 3):
        layout = ZeroLayout(2, 2, stage)
        plan_reshard(source, to="deepspeed", layout=layout).write(root / f"zero{stage}", lambda name: None)
    return root


@pytest.fixture
def folder_of(written: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy to change, without the side file, which has a step of its own."""

    def copy(name: str) -> Path:
        shutil.copytree(written / name, tmp_path / name)
        (tmp_path / name / TAG / "deco_scale.safetensors").unlink()
        return tmp_path / name / TAG

    return copy


def change(file: Path, edit: Callable[[Any], Any]) -> bytes:
    """Edit a file; returns what was in it."""
    whole = file.read_bytes()
    # Written by this test: DeepSpeed's own classes are to stay in it under their names.
    content = torch.load(file, weights_only=False)
    made = edit(content)
    torch.save(content if made is None else made, file)
    return whole


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder)


def test_what_is_not_mixed_is_read(written: Path, folder_of: Callable[[str], Path]) -> None:
    for name in ("universal", "zero1", "zero3"):
        source: Any = open_checkpoint(folder_of(name))
        progress = source.progress
        assert (progress.step, progress.optimizer_steps, progress.samples) == (7, META.optimizer_steps, 70)


@pytest.mark.parametrize("content", [torch.tensor(8.0), torch.tensor(8.0, dtype=torch.float64), 8, 8.0], ids=repr)
@pytest.mark.parametrize("at", [0, -1])
def test_a_parameter_of_another_optimizer_step_is_refused(
    at: int, content: object, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("universal")
    files = sorted(folder.glob("zero/*/step.pt"))
    assert len(files) > 3
    change(files[at], lambda _: content)
    refused(folder, "mixes optimizer steps: .*has 7, .*has 8")


def test_all_parameters_of_another_step_than_the_common_file_are_refused(
    folder_of: Callable[[str], Path],
) -> None:
    folder = folder_of("universal")
    for file in folder.glob("zero/*/step.pt"):
        change(file, lambda _: torch.tensor(8.0))
    refused(folder, "mixes optimizer steps: .*has 7, .*has 8")


def test_a_common_file_of_another_step_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("universal")
    file = folder / "zero" / "optimizer_state.pt"

    def edit(content: Any) -> None:
        content["optimizer_state_dict"]["state"][0]["step"] = torch.tensor(6.0)

    whole = change(file, edit)
    refused(folder, r"mixes optimizer steps: .*optimizer_state\.pt has 6, .*has 7")
    file.write_bytes(whole)

    def add(content: Any) -> None:
        content["optimizer_state_dict"]["state"][1] = {"step": 8}

    change(file, add)
    refused(folder, "mixes optimizer steps")


def test_a_step_that_only_the_common_file_says_counts(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("universal")
    for file in folder.glob("zero/*/step.pt"):
        file.unlink()
    change(folder / "zero" / "optimizer_state.pt", lambda c: c["optimizer_state_dict"]["state"][0].update(step=5))
    source: Any = open_checkpoint(folder)
    assert (source.progress.step, source.progress.optimizer_steps) == (7, 5)


@pytest.mark.parametrize("key", ["global_steps", "skipped_steps", "global_samples"])
@pytest.mark.parametrize("name", ["universal", "zero1", "zero3"])
def test_a_model_file_of_another_step_is_refused(name: str, key: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    files = sorted(folder.glob("*model_states.pt"))
    assert len(files) > 1
    for file in (files[0], files[-1]):
        whole = change(file, lambda content: content.update({key: content[key] + 1}))
        refused(folder, "mixes steps")
        file.write_bytes(whole)


def states_of(content: Any) -> dict[int, dict[str, Any]]:
    inner = content["optimizer_state_dict"]
    base = inner.get("base_optimizer_state") or inner["optimizer_state_dict"]
    states: dict[int, dict[str, Any]] = base["state"]
    return states


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_an_optimizer_file_of_another_step_is_refused(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    files = sorted(folder.glob("*optim_states.pt"))
    assert len(files) == 4
    for file in (files[0], files[-1]):
        for other in (torch.tensor(8.0), None):

            def edit(content: Any, other: Any = other) -> None:
                for state in states_of(content).values():
                    state["step"] = other

            whole = change(file, edit)
            refused(folder, "mixes optimizer files of steps")
            file.write_bytes(whole)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_an_optimizer_file_whose_group_counts_another_step_is_refused(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """Fused optimizers count in the group, not in the state."""
    folder = folder_of(name)

    def in_groups(step: int) -> Callable[[Any], None]:
        def edit(content: Any) -> None:
            for state in states_of(content).values():
                state.pop("step")
            inner = content["optimizer_state_dict"]
            base = inner.get("base_optimizer_state") or inner["optimizer_state_dict"]
            for group in base["param_groups"]:
                group["step"] = step

        return edit

    files = sorted(folder.glob("*optim_states.pt"))
    for file in files:
        change(file, in_groups(5))
    source: Any = open_checkpoint(folder)
    assert source.progress.optimizer_steps == 5
    change(files[-1], lambda content: in_groups_again(content, 6))
    refused(folder, r"mixes optimizer files of steps \['5', '6'\]")


def in_groups_again(content: Any, step: int) -> None:
    inner = content["optimizer_state_dict"]
    for group in (inner.get("base_optimizer_state") or inner["optimizer_state_dict"])["param_groups"]:
        group["step"] = step


def test_groups_of_one_file_of_two_steps_are_refused(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoints_tools.formats.zero.layout.SUB_GROUP_ELEMENTS", 200)
    source = CanonicalReader(written / "canonical")
    layout = ZeroLayout(2, 1, 3)
    plan_reshard(source, to="deepspeed", layout=layout).write(tmp_path / "groups", lambda name: None)
    folder = tmp_path / "groups" / TAG
    open_checkpoint(folder)
    for file in sorted(folder.glob("*optim_states.pt")):

        def edit(content: Any) -> None:
            states = states_of(content)
            assert len(states) > 1
            states[len(states) - 1]["step"] = torch.tensor(8.0)

        whole = change(file, edit)
        refused(folder, rf"{file.name}: its groups are of optimizer steps")
        file.write_bytes(whole)


def test_of_the_model_states_only_what_is_needed_stays_in_memory(folder_of: Callable[[str], Path]) -> None:
    source = open_checkpoint(folder_of("zero3"))
    assert isinstance(source, ZeroReader)
    first, *others = source._model_states
    assert others and set(first.content) == {"dp_world_size", "mp_world_size"}
    assert all(other.groups is first.groups for other in others if other.tp == first.tp)


def test_an_optimizer_file_of_another_stage_is_refused(folder_of: Callable[[str], Path]) -> None:
    one, three = folder_of("zero1"), folder_of("zero3")
    file = sorted(one.glob("*optim_states.pt"))[-1]
    shutil.copyfile(three / file.name.removeprefix("bf16_"), file)
    refused(one, "is of ZeRO stage 3, another file of stage 1")


@pytest.mark.parametrize("name", ["universal", "zero1", "zero3"])
def test_a_side_file_of_another_step_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / name, tmp_path / name)
    folder = tmp_path / name / TAG
    open_checkpoint(folder)
    for file in folder.glob("*model_states.pt"):
        change(file, lambda content: content.update(global_steps=8))
    refused(folder, "is of step 7, the files beside it of step 8")
