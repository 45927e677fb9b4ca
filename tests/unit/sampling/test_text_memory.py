"""What a generator holds while it draws: nothing of requests that are done."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deco_scale.models import ModelConfig
from deco_scale.sampling import ImageGenerator, SamplerConfig, SampleRequest

MODEL = ModelConfig(
    kind="t2i_deco", dim=16, num_heads=2, num_blocks=1, patch_size=4, decoder_width=4, decoder_blocks=1,
    text_dim=2, text_tokens=1,
)  # fmt: skip


class TextMemory:
    """A text encoder whose embeddings lie in arrays that can be watched; one text per call."""

    def __init__(self) -> None:
        self._arrays: dict[str, weakref.ref[np.ndarray]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        (text,) = texts
        array = np.full((1, 1, 2), len(text), dtype=np.float32)
        self._arrays[text] = weakref.ref(array)
        return torch.from_numpy(array)

    @property
    def alive(self) -> set[str]:
        """Texts whose embeddings still take memory."""
        return {text for text, array in self._arrays.items() if array() is not None}


def generator_of(encode: TextMemory) -> ImageGenerator:
    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return condition.sum((1, 2)).view(-1, 1, 1, 1) - 0.3 * x

    return ImageGenerator(velocity, MODEL, encode=encode, null=torch.zeros(1, 2), device=torch.device("cpu"))


def test_text_embeddings_are_released_after_the_last_image_that_needs_them() -> None:
    """``a`` is needed again by the third and fourth image, the others once."""
    memory = TextMemory()
    jobs = [SampleRequest(text, seed=seed) for seed, text in enumerate("abaac")]
    drawn = generator_of(memory).images(jobs, size=(4, 4), sampler=SamplerConfig(num_steps=2), batch=1)
    alive = []
    for _ in drawn:
        alive.append(memory.alive)
    assert alive == [{"a"}, {"a"}, {"a"}, set(), set()]


def test_negative_prompt_is_kept_until_its_last_image() -> None:
    memory = TextMemory()
    # The first image encodes the negative prompt alone: its prompt is the same text.
    jobs = [
        SampleRequest("blur", negative="blur"),
        SampleRequest("a"),
        SampleRequest("b"),
        SampleRequest("blur", negative="blur"),
        SampleRequest("c"),
    ]
    drawn = generator_of(memory).images(jobs, size=(4, 4), sampler=SamplerConfig(num_steps=2), batch=1)
    assert [memory.alive for _ in drawn] == [{"blur"}, {"blur"}, {"blur"}, set(), set()]


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """Of 20 images that the caller throws away, the generator holds at most this batch and the last one."""
    memory = TextMemory()
    jobs = [SampleRequest(f"text {seed}", seed=seed) for seed in range(20)]
    drawn = generator_of(memory).images(jobs, size=(4, 4), sampler=SamplerConfig(num_steps=2), batch=1)
    images: list[weakref.ref[np.ndarray]] = []
    for _, image in drawn:
        images.append(weakref.ref(image if image.base is None else image.base))
        del image
        assert sum(image() is not None for image in images) <= 2
        assert not memory.alive
