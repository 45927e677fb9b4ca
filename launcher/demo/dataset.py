"""The demo's data: captioned crops of ten photographs that scikit-image and scikit-learn ship."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from data_pipeline.errors import DataError
from data_pipeline.stream.sampler import generator

CROP_SIDE = 64
"""Side of the stored crops in pixels, twice what the demo trains at."""
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a view of {}", "an image of {}", "this shows {}")


@dataclass(frozen=True, slots=True)
class Subject:
    """A photograph, the words that training captions use, and words that none of them does."""

    file: str
    words: str
    paraphrases: tuple[str, str]


SUBJECTS = (
    Subject("chelsea.png", "a cat", ("a kitten", "a tabby pet with whiskers")),
    Subject("astronaut.png", "an astronaut", ("a cosmonaut", "a woman in a space suit")),
    Subject("coffee.png", "a cup of coffee", ("a mug of espresso", "a hot cappuccino")),
    Subject("rocket.jpg", "a rocket", ("a missile", "a spacecraft on its launch pad")),
    Subject("hubble_deep_field.jpg", "distant galaxies", ("stars in outer space", "the universe")),
    Subject("motorcycle_left.png", "a motorcycle", ("a motorbike", "a parked scooter")),
    Subject("retina.jpg", "a retina", ("the back of an eye", "an eyeball")),
    Subject("ihc.png", "stained tissue", ("a biopsy under a microscope", "cells on a slide")),
    Subject("flower.jpg", "a flower", ("a blossom", "a blooming dahlia")),
    Subject("china.jpg", "a temple", ("a pagoda", "a Chinese palace")),
)
_CROP_KEY = 5


def photograph(subject: Subject) -> Image.Image:
    """The subject's photograph in RGB."""
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise DataError("the demo's photographs need: pip install 'deco-scale[demo]'") from error
    for folder in (Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"):
        if (folder / subject.file).exists():
            with Image.open(folder / subject.file) as image:
                return image.convert("RGB")
    raise DataError(f"{subject.file} is in neither scikit-image nor scikit-learn as installed")


def crops(subject: Subject, count: int, *, seed: int) -> Iterator[Image.Image]:
    """Square crops of 60 to 100% of the short side, half of them mirrored."""
    image = photograph(subject)
    random = generator(seed, _CROP_KEY, SUBJECTS.index(subject))
    for _ in range(count):
        side = int(min(image.size) * random.uniform(0.6, 1.0))
        left = int(random.integers(image.width - side + 1))
        top = int(random.integers(image.height - side + 1))
        box = (left, top, left + side, top + side)
        crop = image.resize((CROP_SIDE, CROP_SIDE), Image.Resampling.LANCZOS, box=box)
        yield ImageOps.mirror(crop) if random.random() < 0.5 else crop


def write_demo_folder(folder: Path, *, per_subject: int, seed: int = 0) -> int:
    """Write ``per_subject`` crops of each subject with a ``.json`` of captions beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, subject in enumerate(SUBJECTS):
        captions = [template.format(subject.words) for template in TEMPLATES]
        for i, crop in enumerate(crops(subject, per_subject, seed=seed)):
            # Names interleave the subjects, so that a chunk of neighbours holds all of them.
            path = folder / f"{i:05d}_{number:02d}.jpg"
            crop.save(path, quality=95)
            path.with_suffix(".json").write_text(json.dumps({"captions": captions}))
    return per_subject * len(SUBJECTS)
