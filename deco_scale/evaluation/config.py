"""Settings of the evaluation during training."""

from dataclasses import dataclass, field

from deco_scale.sampling import SamplerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Images generated and scored with the EMA weights on all ranks, each ``every`` steps (0: never).

    ``count`` images are generated, ``batch`` at a time on each rank, for the prompts in ``prompts_file`` (one per
    line) in turn or, with class models, for ``classes`` (empty: all). A grid of the first ``grid`` images is
    always saved, all of them as a file for the ADM suite if ``npz`` is set. ``inception_weights`` with
    ``reference`` (an ``.npz`` with ``mu`` and ``sigma``, and for sFID ``mu_s`` and ``sigma_s``) gives FID, sFID
    and Inception score, ``clip_folder`` (a ``transformers`` CLIP) the CLIP score. Scores of few images are biased:
    compare only equal counts.
    """

    every: int = 0
    count: int = 64
    batch: int = 16
    grid: int = 16
    prompts_file: str | None = None
    classes: tuple[int, ...] = ()
    npz: bool = False
    inception_weights: str | None = None
    reference: str | None = None
    clip_folder: str | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every={self.every} must not be negative")
        if min(self.count, self.batch, self.grid) < 1:
            raise ValueError(f"count={self.count}, batch={self.batch}, grid={self.grid} must be at least 1")
        if any(number < 0 for number in self.classes):
            raise ValueError(f"classes={self.classes} must not be negative")
        if self.classes and self.prompts_file is not None:
            raise ValueError("prompts_file is for text models, classes for class models: give one of them")
        if (self.inception_weights is None) != (self.reference is None):
            raise ValueError("inception_weights and reference belong together: FID needs both")
        if self.inception_weights is not None and self.count < 2:
            raise ValueError(f"count={self.count}: FID needs at least 2 images")
        if self.clip_folder is not None and self.prompts_file is None:
            raise ValueError("clip_folder needs prompts_file: CLIP compares images with prompts")
