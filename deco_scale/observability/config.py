"""Settings of Prometheus metrics and alerts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """Prometheus metrics on a port of rank 0's node, and alerts to a webhook.

    ``prometheus_port`` None: no metrics; ``prometheus_host`` is the address to listen on. ``webhook_env`` names
    the environment variable that holds the webhook's URL (https or any URL of apprise), which is a secret.
    """

    prometheus_port: int | None = None
    prometheus_host: str = "127.0.0.1"
    webhook_env: str | None = None

    def __post_init__(self) -> None:
        if self.prometheus_port is not None and not 1 <= self.prometheus_port <= 65535:
            raise ValueError(f"prometheus_port={self.prometheus_port} must be 1 to 65535")
        if self.webhook_env is not None and not self.webhook_env.isidentifier():
            raise ValueError("webhook_env must be the name of an environment variable, not the URL itself")


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Experiment tracking; ``auto`` is online where WANDB_API_KEY is set and offline elsewhere."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "deco-scale"
    name: str | None = None
