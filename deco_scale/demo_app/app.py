"""The page: gradio's components and their event handlers."""

import html
import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from deco_scale.demo_app.service import DemoService
from deco_scale.demo_app.validation import FIELDS, MAX_SEED, SOLVERS, RequestError

_SESSIONS = 64
"""Visitors whose last settings are stored."""


def build_page(service: DemoService, *, title: str, size: tuple[int, int], queue: int, example: str) -> Any:
    """Gradio blocks that run one request at a time; ``size`` is the default (height, width) in pixels.

    Up to ``queue`` requests wait. :meth:`DemoService.generate` checks every value; messages are shown in a text
    box, which renders no markup.
    """
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        records, chosen = gr.State([]), gr.State(0)
        gr.HTML(f"<h2>{html.escape(title)}</h2>")
        with gr.Row():
            with gr.Column(scale=2):
                inputs = _input_fields(service, size, example)
                go = gr.Button("Draw", variant="primary", elem_id="go")
                message = gr.Textbox(label="Message", interactive=False, lines=2, elem_id="message")
            with gr.Column(scale=3):
                gallery, files, shown = _result_fields()
                again = gr.Button("Use these settings", elem_id="again")

        def generate(*values: Any, progress: Any = gr.Progress()) -> list[Any]:
            try:
                images = service.generate(
                    dict(zip(FIELDS, values, strict=True)),
                    lambda done, total: progress((done, total), desc="sampling", unit="steps"),
                )
            except RequestError as error:
                # The previous images stay.
                return [f"Error. {error}", *[gr.skip()] * 5]
            paths = [str(image.path) for image in images]
            settings = [image.settings for image in images]
            captioned = [(path, f"seed {each['seed']}") for path, each in zip(paths, settings, strict=True)]
            done = f"{len(images)} image{'s' if len(images) > 1 else ''} generated."
            return [done, captioned, paths, settings, _text(settings[0]), 0]

        def choose(records: Any, event: gr.SelectData) -> tuple[str, int]:
            index = event.index if isinstance(event.index, int) and 0 <= event.index < len(records) else 0
            return (_text(records[index]) if records else ""), index

        def use(records: Sequence[dict[str, Any]], index: int) -> list[Any]:
            if not records:
                return [gr.skip()] * len(FIELDS)
            return _as_inputs(records[index if index < len(records) else 0])

        # Raw values: they are checked by one function, not by each component.
        outputs = [message, gallery, files, records, shown, chosen]
        go.click(generate, inputs, outputs, preprocess=False, api_name="generate")
        gallery.select(choose, [records], [shown, chosen], api_visibility="private")
        again.click(use, [records, chosen], inputs, api_visibility="private")
    page.queue(max_size=queue, default_concurrency_limit=1, api_open=False)
    page.state_session_capacity = _SESSIONS
    return page


def _input_fields(service: DemoService, size: tuple[int, int], example: str) -> list[Any]:
    """Components of :data:`FIELDS`."""
    limits, default, generator = service.limits, service.default, service.generator

    def integer(value: int, name: str, label: str) -> Any:
        return gr.Number(value, label=label, precision=0, elem_id=name)

    if service.is_text:
        subject: Any = gr.Textbox(example, label="Prompt", lines=2, elem_id="subject")
    else:
        subject = integer(0, "subject", f"Class, 0 to {generator.num_classes - 1}")
    negative = gr.Textbox("", label="Negative prompt", visible=service.is_text, elem_id="negative")
    with gr.Row():
        seed = integer(0, "seed", f"Seed, 0 to {MAX_SEED}")
        random = gr.Checkbox(False, label="Random seed", elem_id="random")
    with gr.Row():
        steps = integer(min(default.num_steps, limits.max_steps), "steps", f"Steps, up to {limits.max_steps}")
        guidance = gr.Number(default.guidance, label="Guidance", elem_id="guidance")
        solver = gr.Dropdown(list(SOLVERS), value=default.solver, label="Solver", elem_id="solver")
    with gr.Row():
        width = integer(size[1], "width", f"Width, multiple of {generator.patch_size}")
        height = integer(size[0], "height", f"Height, multiple of {generator.patch_size}")
        count = integer(1, "count", f"Images, up to {limits.max_images}")
    return [subject, negative, seed, random, steps, guidance, solver, width, height, count]


def _result_fields() -> tuple[gr.Gallery, gr.File, gr.Textbox]:
    """Gallery, files to download, and the settings of the selected image."""
    buttons: list[Any] = ["download", "fullscreen"]
    label = "Settings of the selected image"
    gallery = gr.Gallery(
        label="Images", columns=4, object_fit="contain", interactive=False, elem_id="gallery", buttons=buttons
    )
    files = gr.File(label="PNG files", file_count="multiple", interactive=False, elem_id="files")
    settings = gr.Textbox(
        label=label, lines=6, max_lines=12, interactive=False, elem_id="settings", buttons=["copy"]
    )
    return gallery, files, settings


def _text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=1)


def _as_inputs(settings: dict[str, Any]) -> list[Any]:
    """Values of :data:`FIELDS` that reproduce this image alone."""
    sampler = settings["sampler"]
    values = {
        "subject": settings["prompt"] if "prompt" in settings else settings["class"],
        "negative": settings["negative"],
        "seed": settings["seed"],
        "random": False,
        "steps": sampler["num_steps"],
        "guidance": sampler["guidance"],
        "solver": sampler["solver"],
        "width": settings["width"],
        "height": settings["height"],
        "count": 1,
    }
    return [values[name] for name in FIELDS]
