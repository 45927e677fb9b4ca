"""One run, one configuration: strict YAML, dotted overrides, and errors that name the key.

Each component owns its frozen dataclass; :class:`RunConfig` composes them. Unknown keys name the nearest
known one, wrong types and impossible values name the key, the value and what is allowed.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_pipeline.config import DataConfig
from deco_scale.errors import ConfigError
from deco_scale.evaluation.settings import EvaluationConfig
from deco_scale.kernels import KernelSetting
from deco_scale.models import ModelConfig
from deco_scale.models.attention import AttentionBackend
from deco_scale.models.encoder_settings import ImageEncoderConfig, TextEncoderConfig
from deco_scale.objectives import ObjectiveConfig
from deco_scale.observability.config import MonitorConfig
from deco_scale.observability.redact import REMOVED, is_secret_name, looks_secret, redacted, scrub
from deco_scale.parallel.layout import ParallelConfig
from deco_scale.precision import PrecisionConfig
from deco_scale.sampling import SamplerConfig
from deco_scale.training.settings import (
    CheckpointConfig,
    FaultsConfig,
    OptimizerConfig,
    RunSettings,
    StageConfig,
    WandbConfig,
)
from deco_scale.watchdog.settings import WatchdogConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    backend: AttentionBackend = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """Pictures made while training: one per prompt or class from EMA weights, every so many steps (0: never)."""

    every: int = 0
    prompts: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every={self.every} must not be negative")
        if self.every and bool(self.prompts) == bool(self.classes):
            raise ValueError("prompts (text models) or classes (class models) must say what pictures to make")


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
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: GridConfig = field(default_factory=GridConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must list at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have different names, got {names}")
        for stage in self.stages:
            if stage.resolution % self.model.patch_size:
                raise ValueError(
                    f"stages.{stage.name}.resolution={stage.resolution} is not a multiple of "
                    f"model.patch_size={self.model.patch_size}"
                )
        is_text = self.model.kind == "t2i_deco"
        if is_text and self.text_encoder is None:
            raise ValueError("text_encoder is missing: model.kind t2i_deco needs one")
        if is_text and self.text_encoder and self.text_encoder.max_tokens != self.model.text_tokens:
            raise ValueError(
                f"text_encoder.max_tokens={self.text_encoder.max_tokens} must equal "
                f"model.text_tokens={self.model.text_tokens}"
            )
        if self.compile and self.parallel.tp > 1 and self.parallel.engine == "deepspeed":
            # Not verified against the eager trace yet.
            raise ValueError("compile=true with parallel.tp > 1 needs parallel.engine: fsdp")
        if self.compile and self.parallel.tp > 1 and self.parallel.activation_checkpointing == "selective":
            # Selective checkpointing does not see into a compiled block.
            raise ValueError(
                "compile=true with parallel.tp > 1 does not work with "
                "parallel.activation_checkpointing=selective; possible: none, full"
            )
        wanted = "caption" if is_text else "label"
        if self.data.target != wanted:
            raise ValueError(f"data.target={self.data.target}: model.kind {self.model.kind} needs {wanted}")
        if is_text and self.samples.classes or not is_text and self.samples.prompts:
            raise ValueError(f"samples: model.kind {self.model.kind} draws {'prompts' if is_text else 'classes'}")
        beyond = [c for c in self.samples.classes if not 0 <= c < self.model.num_classes]
        if beyond:
            raise ValueError(f"samples.classes: {beyond[0]} is not in 0..{self.model.num_classes - 1}")
        if self.data.has_text_embeddings and (not is_text or any(stage.data for stage in self.stages)):
            raise ValueError("data.text_states are for text models, and for stages without data of their own")
        if self.objective.repa_weight > 0 and self.image_encoder is None:
            raise ValueError("image_encoder is missing: objective.repa_weight > 0 needs DINOv2")
        if self.objective.repa_weight > 0 and self.objective.repa_layer > self.model.num_blocks:
            raise ValueError(
                f"objective.repa_layer={self.objective.repa_layer} is beyond "
                f"model.num_blocks={self.model.num_blocks}"
            )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML alone reads ``2e-4`` as text. Repeated keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``key.path=value`` overrides, check everything. Raises :class:`ConfigError`.

    Values that look like secrets are refused: the configuration is written to files, pages and wandb. No error
    repeats one.
    """
    shown = scrub(str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {shown}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {shown} is not UTF-8 text") from None
    raw = _parse_yaml(text, f"config file {shown}")
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {shown} must be a mapping of sections")
    for override in overrides:
        _apply_override(raw, override)
    found = list(dict.fromkeys(_secret_keys(raw)))
    if found:
        raise ConfigError(
            "\n".join(
                f"{shown}: {scrub(key)} looks like a secret, and a configuration is written in plain text; leave "
                "it out: the AWS variables or AWS_PROFILE, WANDB_API_KEY, HF_TOKEN and the variable that "
                "monitor.webhook_env names are read from the environment"
                for key in found
            )
        )
    return build_config(raw, source=str(path))


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
    plain = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return yaml.safe_dump(plain, sort_keys=False, width=100)


def _parse_yaml(text: str, where: str) -> Any:
    """``where`` is shown as it is."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        # Its own text quotes the line, cut off at a width: half a secret is not known for one.
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        said = " ".join(scrub(part) for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where} is not valid YAML: {' '.join(said.split())}{place}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(scrub(str(error)).split())}") from None


def _shown(override: str) -> str:
    """An override as an error may quote it."""
    key, separator, text = override.partition("=")
    if looks_secret(key, text):
        text = REMOVED
    return repr(scrub(f"{key}{separator}{text}"))


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {_shown(override)} must look like key.path=value")
    *parents, last = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parents):
        node = _step_into(node, part, ".".join(parents[: depth + 1]), override)
    value = _parse_yaml(text, f"override {_shown(override)}")
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    else:
        node[last] = value


def _step_into(node: Any, part: str, where: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise ConfigError(f"override {_shown(override)}: {scrub(where)} is a value, not a section")
    return node[part]


def _list_index(node: list[Any], part: str, override: str) -> int:
    """A position, or the ``name`` of an entry (stages)."""
    names = [e.get("name") if isinstance(e, dict) else None for e in node]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(node):
        return int(part)
    allowed = [n for n in names if n] or list(range(len(node)))
    raise ConfigError(scrub(f"override {_shown(override)}: no entry {part!r}; possible: {allowed}"))


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
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
    shown = (
        REMOVED if isinstance(value, str) and any(is_secret_name(part) for part in location) else redacted(value)
    )
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
