"""``deco demo``: a web page on this machine that generates images from a checkpoint.

    deco demo --checkpoint runs/demo

It listens on loopback by default and has no login. It sends nothing to the network and fetches nothing from it.
"""

import argparse
import logging
import os
import signal
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.console import RenamedOption, positive, positive_int, print_line
from deco_scale.cli.model_loading import build_generator, load_denoiser, read_checkpoint
from deco_scale.demo_app.validation import GenerationLimits
from deco_scale.distributed.bootstrap import choose_device
from deco_scale.errors import ConfigError, RunError

logger = logging.getLogger(__name__)

_CONNECTIONS = 256
"""Further connections are answered 503."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="step folder, or a run's folder")
    parser.add_argument("--text-encoder", help="its folder, if it has moved since training")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; there is no login")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-side", type=positive_int, default=1024, help="longest side of an image in pixels")
    parser.add_argument("--max-images", type=positive_int, default=16, help="images per request")
    parser.add_argument(
        "--max-pictures", dest="max_images", type=positive_int, action=RenamedOption, help=argparse.SUPPRESS
    )
    parser.add_argument("--max-steps", type=positive_int, default=200, help="solver steps")
    parser.add_argument("--max-seconds", type=positive, default=600.0, help="time limit of a request")
    parser.add_argument("--queue", type=positive_int, default=16, help="requests that may wait")
    parser.add_argument("--batch", type=positive_int, default=4, help="images per batch")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")


def run(args: argparse.Namespace, console: Console) -> int:
    """Serve until interrupted."""
    limits = GenerationLimits(max_side=args.max_side, max_images=args.max_images, max_steps=args.max_steps)
    with tempfile.TemporaryDirectory(prefix="deco_demo_", ignore_cleanup_errors=True) as folder:
        # Gradio reads these when it is imported or builds a page.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=folder)
        _serve(_application(args, limits, Path(folder)), args.host, args.port, console)
    return 0


def _application(args: argparse.Namespace, limits: GenerationLimits, folder: Path) -> Any:
    """The page behind its request filter, as an ASGI application."""
    try:
        import fastapi
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the demo page needs: pip install 'deco-scale[page]'") from error
    from deco_scale.demo_app.app import build_page
    from deco_scale.demo_app.limits import RequestLimits, is_loopback
    from deco_scale.demo_app.service import DemoService

    path, cfg, meta = read_checkpoint(args.checkpoint)
    denoiser = load_denoiser(cfg, path, choose_device("auto", 0))
    generator = build_generator(denoiser, cfg, meta, text_encoder=args.text_encoder, compile=args.compile)
    service = DemoService(
        generator, cfg.samples.sampler, folder, limits=limits, batch=args.batch, max_seconds=args.max_seconds
    )
    side = min(cfg.stages[-1].resolution, limits.max_side // cfg.model.patch_size * cfg.model.patch_size)
    if side < cfg.model.patch_size:
        raise ConfigError(f"--max-side {limits.max_side}: the model's patch has {cfg.model.patch_size} pixels")
    page = build_page(
        service,
        title=f"{Path(cfg.run.dir).name or cfg.model.kind}, {cfg.model.kind}, step {meta.step}",
        size=(side, side),
        queue=args.queue,
        example=cfg.samples.prompts[0] if cfg.samples.prompts else "",
    )
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size="1kb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        # The default theme's fonts would be fetched.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    return RequestLimits(app, folder=folder, local_only=is_loopback(args.host))


def _serve(application: Any, host: str, port: int, console: Console) -> None:
    """Listen first, so that a port in use is a separate error, then serve until interrupted."""
    import uvicorn

    from deco_scale.demo_app.limits import is_loopback

    host = host.strip("[]")
    ipv6 = ":" in host
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_CONNECTIONS, dualstack_ipv6=ipv6)
    except (OSError, OverflowError, ValueError) as error:  # ValueError: no IPv6 here
        raise RunError(f"--host {host} --port {port}: {error}") from error
    if not is_loopback(host):
        logger.warning("%s can be reached from other machines, and the page has no login", host)
    name = f"[{host}]" if ipv6 else host
    print_line(console, f"page at http://{name}:{listener.getsockname()[1]}/, press Ctrl-C to stop")
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=3,
            server_header=False,
        )  # fmt: skip
    )
    # Uvicorn shuts down at both signals, then raises them again; our handler lets the folder be removed.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with listener, suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
