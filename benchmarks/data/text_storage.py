"""Bytes that precomputed text embeddings take, with padding and without, as ``deco embed`` writes them.

    python -m benchmarks.data.text_storage --encoder all-MiniLM-L6-v2

The demo's captions (ten subjects, six captions each) and its encoder (``requirements-demo-encoder.txt``) at 128
tokens; with prefixes, each of these short captions is five texts. Bytes are proportional to the encoder's width.
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from data_pipeline.captions import PREFIXES
from data_pipeline.index.build import build_index, save_index
from data_pipeline.index.format import load_index
from data_pipeline.pack.readers import read_folder
from data_pipeline.pack.writer import pack
from data_pipeline.storage.base import open_store
from data_pipeline.text_embeddings import TextEmbeddingStore
from deco_scale.cli.main import main as deco
from launcher.demo.dataset import SUBJECTS, TEMPLATES, write_demo_folder

CONFIG = Path(__file__).parents[2] / "configs" / "t2i_tiny.yaml"
TOKENS = 128
TARGET_WIDTH = 2048
"""Of Qwen3-1.7B."""


def bytes_per_text(encoder: str, folder: Path, *, zero_padding: bool) -> tuple[float, int]:
    """Bytes of sidecars for each text of the demo's captions, and the encoder's width."""
    data = open_store(str(folder / "shards"))
    if not (folder / "shards").exists():
        write_demo_folder(folder / "images", per_subject=1)
        pack(read_folder(folder / "images", []), data, shard_bytes=10**9, rejects=[])
        save_index(data, build_index(data)[0])
    target = folder / f"zero_padding_{zero_padding}"
    settings = {
        "data.url": folder / "shards",
        "data.text_states": target,
        "data.prefix_probability": 0.5,
        "model.text_tokens": TOKENS,
        "text_encoder.path": encoder,
        "text_encoder.max_tokens": TOKENS,
        "text_encoder.zero_padding": str(zero_padding).lower(),
    }
    if deco(["embed", "--config", str(CONFIG), *(f"{name}={value}" for name, value in settings.items())]):
        raise SystemExit("deco embed failed")
    width = TextEmbeddingStore(open_store(str(target)), load_index(data)).identity.width
    texts = len(SUBJECTS) * len(TEMPLATES) * (1 + len(PREFIXES))
    return sum(path.stat().st_size for path in target.glob("*.states.tar")) / texts, width


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of all-MiniLM-L6-v2, or any encoder as wide")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        for zero_padding in (False, True):
            size, width = bytes_per_text(args.encoder, Path(scratch), zero_padding=zero_padding)
            tokens, scaled = size / (2 * width), size / 1024 * TARGET_WIDTH / width
            console.print(
                f"zero_padding={zero_padding}: {size / 1024:.1f} KiB per text at width {width}, as much as "
                f"{tokens:.1f} tokens; {scaled:.0f} KiB at width {TARGET_WIDTH}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
