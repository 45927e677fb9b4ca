"""What evaluation tests share: images that depend on their request alone, a small Inception, scorers' rules."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deco_scale.cli.main import main as deco
from deco_scale.evaluation import fid
from deco_scale.evaluation.fid import Gaussian, InceptionScore, Moments, frechet_distance, precision_recall
from deco_scale.sampling.generate import SampleRequest

BENCHMARKS = ["imagenet", "geneval", "dpg"]
STEPS = ["--num-steps", "2", "--batch", "3"]
METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]


def official_geneval(folder: Path) -> dict[str, list[str]]:
    """What the scorer would look at: its own rules for folders and files, and how it reads the metadata."""
    found = {}
    for sub in sorted(folder.iterdir()):
        if sub.is_dir() and sub.name.isdigit():
            metadata = json.loads((sub / "metadata.jsonl").read_text())
            names = [p.name for p in (sub / "samples").iterdir() if re.match(r"\d+\.png", p.name)]
            for name in names:
                Image.open(sub / "samples" / name).load()
            found[metadata["prompt"]] = sorted(names)
    return found


OFFICIAL_DPG = """images/132.png, 1.0, 0.5, 0.75, 0.75, 0.75
images/a, b/29.png, 1.0, 1.0, 1e-05, 1.0, 0.7500025
Model: images
L1 category scores:
\tentity: 81.25
\tattribute: 70.0
L2 category scores:
\tattribute - color: 70.0
\tentity - part: 75.0
\tentity - whole: 87.5
Image path: images
Save results to: images/dpg-bench_20250101-000000_results.txt
DPG-Bench score: 75.000125
"""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(count: int, width: int, seed: int) -> Tensor:
    """Correlated features away from zero."""
    return normal(count, width, seed=seed) @ normal(width, width, seed=seed + 50) / width**0.5 + 2 + seed


def gaussian_of(x_NF: Tensor) -> Gaussian:
    moments = Moments(x_NF.shape[1])
    moments.add(x_NF)
    return moments.gaussian()


def images(count: int, seed: int = 0, side: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side + 2, 3), dtype=np.uint8)


class SmallInception(nn.Module):
    """Stands for Inception: linear features of the pixels."""

    published, digest = False, "0" * 64

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)
        generator = torch.Generator().manual_seed(0)
        self.map = torch.randn(6 * 8 * 3, 12, generator=generator)
        with torch.no_grad():
            self.fc.weight.normal_(generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        pool = (x.flatten(1).float() / 255) @ self.map
        return SimpleNamespace(pool_BF=pool, spatial_BF=pool[:, :7] ** 2)

    def class_scores(self, pool: Tensor) -> Tensor:
        return pool @ self.fc.weight.T


def small_inception(patch: pytest.MonkeyPatch) -> SmallInception:
    """In place of Inception, with features of its widths expected."""
    for name, value in (("POOL_DIM", 12), ("SPATIAL_DIM", 7), ("NUM_CLASSES", 5)):
        patch.setattr(fid, name, value)
    return SmallInception()


def expected_scores(inception: Any, samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    a, b = inception(torch.from_numpy(samples)), inception(torch.from_numpy(reference))
    spread = InceptionScore(5)
    spread.add(inception.class_scores(a.pool_BF))
    precision, recall = precision_recall(a.pool_BF, b.pool_BF)
    return {
        "fid": frechet_distance(gaussian_of(a.pool_BF), gaussian_of(b.pool_BF)),
        "sfid": frechet_distance(gaussian_of(a.spatial_BF), gaussian_of(b.spatial_BF)),
        "inception_score": spread.score(),
        "precision": precision,
        "recall": recall,
    }


def generator(side: tuple[int, int] = (6, 8), fail_at: int | None = None) -> Any:
    """A generator's ``images``: each depends on its request alone; interrupted at the ``fail_at``-th."""

    def generate(requests: Sequence[SampleRequest]) -> Iterator[tuple[SampleRequest, Any]]:
        for number, request in enumerate(requests):
            if number == fail_at:
                raise KeyboardInterrupt
            seed = [request.seed, request.index, *str(request.condition).encode()]
            yield request, np.random.default_rng(seed).integers(0, 256, (*side, 3), dtype=np.uint8)

    return generate


def nothing() -> None:
    """Ignore an image."""


def in_threads(world: int, share: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """``share(rank, gather)`` of all ranks at once, with a gather that waits for all."""
    barrier, box = threading.Barrier(world, timeout=60), [None] * world

    def gather_of(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            box[rank] = value
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

        return gather

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: share(rank, gather_of(rank)), range(world)))


def arguments(benchmark: str, material: Path, out: Path, *more: str) -> list[str]:
    return {
        "imagenet": [
            "evaluate",
            "imagenet",
            "--checkpoint",
            str(material / "classes"),
            "--count",
            "23",
            "--piece",
            "4",
        ],
        "geneval": [
            *("evaluate", "geneval", "--checkpoint", str(material / "text")),
            *("--metadata", str(material / "metadata.jsonl")),
        ],
        "dpg": [
            *("evaluate", "dpg", "--checkpoint", str(material / "text")),
            *("--prompts", str(material / "prompts.tar.gz")),
        ],
    }[benchmark] + ["--out", str(out / benchmark), *STEPS, *more]


def draw_on_each(material: str, out: str) -> None:
    for benchmark in BENCHMARKS:
        assert deco(arguments(benchmark, Path(material), Path(out))) == 0
    # An error of the first process is one of all: nobody waits.
    assert deco(arguments("dpg", Path(material), Path(out), "--guidance", "2")) == 2


def make_clip(folder: Path) -> Path:
    """A small CLIP with random weights and a word tokenizer that ends texts as CLIP's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "square", "circle"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    text = {"vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    vision = {"image_size": 28, "patch_size": 14}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text | small, vision_config=vision | small, projection_dim=8)
        CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    return folder
