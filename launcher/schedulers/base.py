"""Validated description of a cluster job, and how jobs are rendered from the templates in ``templates/``."""

import json
import re
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deco_scale.config import RunConfig, load_config
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import check_tp
from deco_scale.observability.redact import holds_secret, looks_secret
from deco_scale.parallel.mesh import resolve_parallel_dims

TEMPLATES = Path(__file__).with_name("templates")
_SECRET = "looks like a secret, which would be written in plain text"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterJob:
    """A training job; templates see it as ``job``.

    ``processes`` run on each node, with a GPU each if ``gpus``. ``literals`` are environment variables written
    into the job; the values of ``references`` come from elsewhere. ``grace_s``: seconds between the stop signal
    and SIGKILL. ``max_restarts`` limits restarts after crashes. ``entry`` is the folder of this repository on the
    nodes. Raises :class:`ConfigError` for control characters and a negative ``max_restarts``.
    """

    name: str
    config: str
    overrides: Sequence[str]
    nodes: int
    processes: int
    gpus: bool
    entry: str
    python: str
    preflight: bool = True
    literals: Sequence[tuple[str, str]] = ()
    references: Sequence[str] = ()
    grace_s: int = 120
    max_restarts: int = 10

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts {self.max_restarts} must not be negative")
        for text in (self.name, self.config, self.entry, self.python, *self.overrides):
            check_text(text, option="an argument")

    def command(self, program: str) -> list[str]:
        """Command line that runs ``train`` or ``preflight``, word by word."""
        return [self.python, f"{self.entry}/launcher/{program}.py", "--config", self.config, *self.overrides]

    def node_agent(self, *options: str, rank_variable: str = "", config: str = "") -> list[str]:
        """Command line of the node agent with ``options``, or that runs the job on one node by ``config``."""
        words = [self.python, "-m", "launcher.schedulers.node_agent", *options]
        if rank_variable:
            words += ["--nodes", str(self.nodes), "--processes", str(self.processes)]
            words += ["--node-rank-from", rank_variable, *(["--preflight"] if self.preflight else [])]
            words += ["--", "--config", config, *self.overrides]
        return words


def check_text(text: str, *, option: str) -> None:
    """Raises :class:`ConfigError` where text is empty or has a line break or another control character."""
    if not text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigError(f"{option} {text!r} is empty or has a control character")


def check_names(*rules: tuple[str, str | None, str, str]) -> None:
    """Each rule is (option, value, pattern, what is allowed); the first that fails raises :class:`ConfigError`."""
    for option, value, pattern, allowed in rules:
        if value is not None and not re.fullmatch(pattern, value):
            raise ConfigError(f"{option} {value!r} is not allowed; possible: {allowed}")


def refuse_secret(name: str, value: str, *, instead: str) -> None:
    """Raises :class:`ConfigError` that names the key, never the value, and says what to do ``instead``."""
    if looks_secret(name, value):
        raise ConfigError(f"{name} {_SECRET}; {instead}")


def refuse_secret_text(text: str, *, file: str) -> None:
    """Raises :class:`ConfigError` that names the first line of a file that holds a credential."""
    for number, line in enumerate(text.splitlines(), start=1):
        if holds_secret(line):
            raise ConfigError(f"{file}, line {number}, {_SECRET}")


def parse_variables(given: Sequence[str]) -> dict[str, str | None]:
    """Environment variables of ``--env``: ``NAME=value``, None for ``NAME`` alone. Raises :class:`ConfigError`."""
    variables: dict[str, str | None] = {}
    for entry in given:
        name, separator, value = entry.partition("=")
        # The value stays out of the message: it may be a secret.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {name!r} is no name of a variable; possible: NAME or NAME=value")
        if name in variables:
            raise ConfigError(f"--env {name} is given twice")
        refuse_secret(name, value, instead="give its name alone (--env NAME): then only a reference is written")
        if value:
            check_text(value, option=f"--env {name}:")
        variables[name] = value if separator else None
    return variables


def fit(config: Path, overrides: Sequence[str], *, ranks: int) -> tuple[RunConfig, list[str]]:
    """The configuration on ``ranks`` processes, and a line about each stage.

    Raises :class:`ConfigError` where they do not fit each other.
    """
    cfg = load_config(config, overrides)
    dims = resolve_parallel_dims(cfg.parallel, ranks)
    check_tp(cfg.model, dims.tp)
    lines = [f"{ranks} ranks: dp_replicate {dims.dp_replicate} x dp_shard {dims.dp_shard} x tp {dims.tp}"]
    for stage in cfg.stages:
        batch, micro_batch = stage.global_batch, stage.fitted(dims.dp).micro_batch
        steps = batch // dims.dp // micro_batch
        lines.append(
            f"stage {stage.name}: {stage.steps} steps at {stage.resolution} px, global batch {batch} = "
            f"micro-batch {micro_batch} x accumulation {steps} x dp {dims.dp}"
        )
    return cfg, lines


def render_template(file: Path | None, default: str, variables: dict[str, Any]) -> str:
    """The job's text from the user's ``file``, or from the template ``default`` of this package.

    Templates run in Jinja2's sandbox. Raises :class:`ConfigError` with the file, the line and the undefined
    variable or other fault.
    """
    path = file or TEMPLATES / default
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader([path.parent, TEMPLATES]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quote": shlex.quote, "literal": escape_dollars}
    environment.policies["json.dumps_function"] = yaml_scalar
    try:
        refuse_secret_text(path.read_text(encoding="utf-8"), file=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template {path} cannot be read: {error}") from error
    try:
        return environment.get_template(path.name).render(variables)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{error.filename or path}, line {error.lineno}: {error.message}") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        folders = {path.parent, TEMPLATES}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent in folders]
        where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(path)
        raise ConfigError(f"{where}: {error}") from error


def yaml_scalar(value: Any, **settings: Any) -> str:
    """JSON that every version of YAML reads as the same: what is not printable ASCII is escaped as YAML does."""
    text = json.dumps(value, **settings, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", text)


def escape_dollars(text: str) -> str:
    """Kubernetes replaces ``$(NAME)`` in commands and values; a doubled dollar keeps it as it is."""
    return re.sub(r"\$(?=[$(])", "$$", text)
