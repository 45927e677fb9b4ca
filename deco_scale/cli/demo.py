"""``deco demo``: a page on this machine that draws pictures from a checkpoint.

    deco demo --checkpoint runs/demo

Opened on loopback unless told otherwise, without any login. Nothing is fetched from the network or sent there.
"""

import argparse
import os
import shutil
import signal
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from deco_scale.cli.model_loading import load_generator
from deco_scale.config import RunConfig
from deco_scale.demo_app.limits import RequestLimits, is_loopback
from deco_scale.demo_app.validation import Limits
from deco_scale.errors import ConfigError, RunError

_CONNECTIONS = 256
"""Beyond these, requests are answered 503 at once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="step folder, or a run's folder")
    parser.add_argument("--text-encoder", help="folder, where it has moved since training")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; there is no login")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-side", type=int, default=1024, help="longest side of a picture in pixels")
    parser.add_argument("--max-pictures", type=int, default=16, help="pictures of one order")
    parser.add_argument("--max-steps", type=int, default=200, help="solver steps")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="longest time that an order may take")
    parser.add_argument("--queue", type=int, default=16, help="orders that may wait")
    parser.add_argument("--batch", type=int, default=4, help="pictures drawn at a time")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")


def run(args: argparse.Namespace, console: Console) -> int:
    """Serve until interrupted."""
    try:
        limits = Limits(max_side=args.max_side, max_pictures=args.max_pictures, max_steps=args.max_steps)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-')}") from error
    if args.queue < 1 or args.batch < 1 or args.max_seconds <= 0:
        raise ConfigError("--queue, --batch and --max-seconds must be positive")
    folder = Path(tempfile.mkdtemp(prefix="deco_demo_"))
    try:
        # Gradio reads them when it is imported or builds a page.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        application = _application(args, limits, folder)
        _serve(application, args.host, args.port, console)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _application(args: argparse.Namespace, limits: Limits, folder: Path) -> Any:
    """The guarded page as an ASGI application."""
    try:
        import fastapi
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the demo page needs: pip install 'deco-scale[page]'") from error
    from deco_scale.demo_app.app import build_page
    from deco_scale.demo_app.service import DemoService

    generator, cfg, meta = load_generator(args.checkpoint, text_encoder=args.text_encoder, compile=args.compile)
    studio = DemoService(
        generator, cfg.samples.sampler, folder, limits=limits, batch=args.batch, max_seconds=args.max_seconds
    )
    side = _default_side(cfg, limits)
    page = build_page(
        studio,
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


def _default_side(cfg: RunConfig, limits: Limits) -> int:
    side = min(cfg.stages[-1].resolution, limits.max_side // cfg.model.patch_size * cfg.model.patch_size)
    if side < cfg.model.patch_size:
        raise ConfigError(f"--max-side {limits.max_side}: the model's patch has {cfg.model.patch_size} pixels")
    return side


def _serve(application: Any, host: str, port: int, console: Console) -> None:
    """Listen first, so that a port in use is an error of its own, then serve until interrupted."""
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(_CONNECTIONS)
    except (OSError, OverflowError) as error:
        listener.close()
        raise RunError(f"--host {host} --port {port}: {error}") from error
    if not is_loopback(host):
        warning = f"WARNING: {host} can be reached from other machines, and the page has no login"
        console.print(warning, markup=False, soft_wrap=True)
    number = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    console.print(f"page at http://{shown}:{number}/, Ctrl-C ends it", markup=False, soft_wrap=True)
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
    # Uvicorn ends in good order at both signals, then raises them again; ours lets the folder be removed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with listener, suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
