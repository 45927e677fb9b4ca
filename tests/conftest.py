"""Fixtures that several test modules share; each is made once per session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the tests may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Triton decides when a kernel is defined whether it is interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from data_pipeline.storage.dev_server import S3Server  # noqa: E402
from deco_scale.observability import redact  # noqa: E402
from tests.support import assets  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_for_the_next_module() -> Iterator[None]:
    """A process group is an error; the precision of products, which a training step sets, is put back."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    assert not torch.distributed.is_initialized(), "a test has left its process group behind"


@pytest.fixture(autouse=True)
def no_secret_is_left_for_the_next_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, Hypothesis' words among it, would be taken out of the texts of all later ones."""
    monkeypatch.setattr(redact, "_registered", set())


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assets.make_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assets.make_image_encoder(tmp_path_factory.mktemp("image_encoder"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assets.make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback, for the whole session."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    # In order it would take ten seconds.
    server.kill()


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's AWS variables pointing at it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
