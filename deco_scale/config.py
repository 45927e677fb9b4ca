"""One run, one configuration: YAML 1.2 with ``base`` files, dotted overrides, and errors that name the key.

Each component owns its frozen dataclass; :class:`RunConfig` composes them.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.stream.buckets import bucket_sizes
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.errors import ConfigError
from deco_scale.evaluation.config import EvaluationConfig
from deco_scale.kernels.select import KernelSetting
from deco_scale.models.config import (
    AttentionConfig,
    ImageEncoderConfig,
    ModelConfig,
    Switch,
    TextEncoderConfig,
)
from deco_scale.objectives.config import ObjectiveConfig
from deco_scale.observability.config import MonitorConfig, WandbConfig
from deco_scale.observability.redact import REMOVED, is_secret_name, looks_secret, redacted, scrub
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.config import ParallelConfig
from deco_scale.precision.config import PrecisionConfig
from deco_scale.sampling.config import SampleImagesConfig
from deco_scale.training.config import FaultsConfig, RunSettings, StageConfig
from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.yaml import dump_yaml, load_yaml, merged


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that defines a run; saved resolved as ``config.yaml`` in the run's folder."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    run: RunSettings
    model: ModelConfig
    data: DataConfig
    stages: tuple[StageConfig, ...]
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    text_encoder: TextEncoderConfig | None = None
    image_encoder: ImageEncoderConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    kernels: KernelSetting = "auto"
    compile: Switch = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: SampleImagesConfig = field(default_factory=SampleImagesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        for problem in self._conflicts():
            raise ValueError(problem)

    def _conflicts(self) -> Iterator[str]:
        """What does not fit together, across sections."""
        model, objective, samples = self.model, self.objective, self.samples
        if not self.stages:
            yield "stages must list at least one stage"
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            yield f"stages must have different names, got {names}"
        for stage in self.stages:
            if stage.resolution % model.patch_size:
                key = f"stages.{stage.name}.resolution={stage.resolution}"
                yield f"{key} is not a multiple of model.patch_size={model.patch_size}"
        is_text, text = model.kind == "t2i_deco", self.text_encoder
        if is_text and text is None:
            yield "text_encoder is missing: model.kind t2i_deco needs one"
        if is_text and text and text.max_tokens != model.text_tokens:
            yield f"text_encoder.max_tokens={text.max_tokens} must equal model.text_tokens={model.text_tokens}"
        expected = "caption" if is_text else "label"
        if self.data.target != expected:
            yield f"data.target={self.data.target}: model.kind {model.kind} needs {expected}"
        if samples.classes if is_text else samples.prompts:
            yield f"samples: model.kind {model.kind} samples {'prompts' if is_text else 'classes'}"
        for beyond in (c for c in samples.classes if not 0 <= c < model.num_classes):
            yield f"samples.classes: {beyond} is not in 0..{model.num_classes - 1}"
        profile, total = self.run.profile, sum(stage.steps for stage in self.stages)
        if profile.at_step is not None and profile.at_step + profile.steps - 1 > total:
            yield f"run.profile: step {profile.at_step + profile.steps - 1} is beyond the {total} steps of the run"
        if self.data.has_text_embeddings and (not is_text or any(stage.data for stage in self.stages)):
            yield "data.text_states are for text models, and for stages without data of their own"
        if objective.repa_weight > 0 and self.image_encoder is None:
            yield "image_encoder is missing: objective.repa_weight > 0 needs DINOv2"
        if objective.repa_weight > 0 and objective.repa_layer > model.num_blocks:
            yield f"objective.repa_layer={objective.repa_layer} is beyond model.num_blocks={model.num_blocks}"

    def batch_shapes(self) -> Iterator[tuple[int, int, int]]:
        """(samples, image tokens, text tokens) of a rank's micro-batch, for every bucket of every stage."""
        for stage in self.stages:
            side, aspect = stage.resolution, self.data.bucket_aspect
            for height, width in bucket_sizes(side, multiple=self.model.patch_size, max_aspect=aspect):
                rows, cols = self.model.grid(height, width)
                yield stage.micro_batch, rows * cols, self.model.text_tokens


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path`` over its ``base``, apply ``key.path=value`` overrides, check everything.

    ``base: other.yaml`` names a local file, relative to the one that names it, which may have a base itself.
    Mappings are merged key by key; lists (also ``stages``), values and null replace those of the base.

    Raises :class:`ConfigError` for files that cannot be read, for problems of the merged configuration (all of
    them at once), and for values that look like secrets, because the configuration is written to files, pages
    and wandb. No error quotes one.
    """
    raw, files = _read(Path(path))
    for override in overrides:
        _apply_override(raw, override)
    source = files[0] + (f" (base: {', '.join(files[1:])})" if files[1:] else "")
    advice = (
        "looks like a secret, and a configuration is written in plain text; leave it out: the AWS variables or "
        "AWS_PROFILE, WANDB_API_KEY, HF_TOKEN and the variable that monitor.webhook_env names are read from the "
        "environment"
    )
    if secrets := dict.fromkeys(_secret_keys(raw)):
        raise ConfigError("\n".join(f"{source}: {scrub(key)} {advice}" for key in secrets))
    return build_config(raw, source=source)


def _read(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """A file's mapping merged over its base's, and the names of all files; ``above``: those it is a base of."""
    shown = scrub(str(path))
    source = f"config file {shown}" + (f" (base of {scrub(str(above[-1]))})" if above else "")
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"{source}: the files are each other's base")
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"), source)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source} is not UTF-8 text") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must be a mapping of sections")
    if "base" not in raw:
        return raw, [shown]
    base = raw.pop("base")
    if not isinstance(base, str) or not base or "://" in base:
        raise ConfigError(f"{source}: base={redacted(base)!r} must be the path of a local file")
    below, files = _read(path.parent / base, (*above, path))
    return merged(below, raw), [shown, *files]


def build_config(raw: dict[str, Any], *, source: str) -> RunConfig:
    """Check a nested mapping; every problem of the mapping is listed in one :class:`ConfigError`."""
    try:
        encoded = json.dumps(raw, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(scrub(f"{source}: numbers must be finite, not nan or inf ({error})")) from None
    try:
        return TypeAdapter(RunConfig).validate_json(encoded)
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(scrub(f"{source}: {problem}") for problem in problems)) from None


def _secret_keys(value: Any, key: str = "", *, named: bool = False) -> Iterator[str]:
    """Dotted keys of texts that look like secrets, by the name of any key above them or by themselves."""
    if isinstance(value, dict):
        for name, item in value.items():
            below = f"{key}.{name}" if key else str(name)
            if looks_secret("", str(name)):
                yield f"a key of {key or 'the configuration'}"
            else:
                yield from _secret_keys(item, below, named=named or is_secret_name(str(name)))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _secret_keys(item, f"{key}.{position}", named=named)
    elif isinstance(value, str) and value and (named or looks_secret("", value)):
        yield key


def dump_config(cfg: RunConfig) -> str:
    """Resolved YAML that :func:`load_config` reads back to an equal configuration."""
    return dump_yaml(json.loads(json.dumps(dataclasses.asdict(cfg))))


def _shown(override: str) -> str:
    """An override as an error may quote it."""
    key, separator, text = override.partition("=")
    if looks_secret(key, text):
        text = REMOVED
    return repr(scrub(f"{key}{separator}{text}"))


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    told = f"override {_shown(override)}"
    if not separator or not key:
        raise ConfigError(f"{told} must look like key.path=value")
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, dict | list):
            raise ConfigError(f"{told}: {scrub('.'.join(parts[:depth]))} is a value, not a section")
        at: Any = _list_index(node, part, told) if isinstance(node, list) else part
        if depth == len(parts) - 1:
            node[at] = load_yaml(text, told)
        elif isinstance(node, dict) and node.get(at) is None:
            node[at] = {}
        node = node[at]


def _list_index(node: list[Any], part: str, told: str) -> int:
    """A position, or the ``name`` of an entry (stages)."""
    names = [e.get("name") if isinstance(e, dict) else None for e in node]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(node):
        return int(part)
    allowed = [n for n in names if n] or list(range(len(node)))
    raise ConfigError(scrub(f"{told}: no entry {part!r}; possible: {allowed}"))


def _explain(error: Any) -> str:
    # "auto or a boolean" is two problems, with the alternative at the end of the path.
    location = [str(part) for part in error["loc"] if part not in ("bool", "literal['auto']")]
    key = ".".join(location) or "the configuration"
    kind, value = error["type"], error.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {key}; {hint}known here: {', '.join(sorted(known))}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if error["loc"] else message
    secret = isinstance(value, str) and any(is_secret_name(part) for part in location)
    shown = REMOVED if secret else redacted(value)
    return f"{key}={shown!r} is not allowed: {message[0].lower()}{message[1:]}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Field names of the dataclass at ``location`` in :class:`RunConfig`."""
    current: Any = RunConfig
    for part in location:
        if dataclasses.is_dataclass(current) and isinstance(part, str):
            current = typing.get_type_hints(current).get(part)
        elif typing.get_origin(current) is tuple:
            current = typing.get_args(current)[0]
        if typing.get_origin(current) in (typing.Union, types.UnionType):
            current = next(a for a in typing.get_args(current) if a is not type(None))
    return [f.name for f in dataclasses.fields(current)] if dataclasses.is_dataclass(current) else []
