"""The page of ``mvision demo``, and its server. The only module that imports gradio.

Neither the server nor the page in the browser asks any other machine for anything: gradio's telemetry is off, fonts are
those of the system, and browsers are told to refuse whatever lies elsewhere.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI

from mvision.deploy import demo_html as html
from mvision.deploy.demo_model import DemoModel

THRESHOLD = 0.5
MOST_BYTES = 64 << 20  # of an upload
AT_ONCE = 4  # pictures that are read and drawn at the same time; the forward passes take turns
WAITING = 32  # pictures of all people that may wait
SECONDS_TO_END = 1  # that open pages get after Ctrl-C
TEMPORARY = "GRADIO_TEMP_DIR"  # the environment variable that names the folder of uploads
# What a browser may load: this server's own files, and what the page itself makes.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def serve(
    models: Sequence[DemoModel], examples: Sequence[str], listener: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve the page until a signal comes, whose exception (``KeyboardInterrupt`` for Ctrl-C) is raised at the end.

    Args:
        models: one, or two to be shown side by side.
        examples: picture files to choose from; the first one is shown when the page is opened.
        listener: a socket that listens already.
        ready: is called when the page can be opened.
    """
    before = os.environ.get(TEMPORARY)
    with tempfile.TemporaryDirectory(prefix="mvision-demo-") as folder:
        os.environ[TEMPORARY] = folder
        try:
            app = make_app(models, examples)
            config = uvicorn.Config(
                app, log_level="critical", timeout_graceful_shutdown=SECONDS_TO_END, access_log=False
            )
            _Server(config, ready).run(sockets=[listener])
        finally:
            if before is None:
                del os.environ[TEMPORARY]
            else:
                os.environ[TEMPORARY] = before


def make_app(models: Sequence[DemoModel], examples: Sequence[str] = ()) -> FastAPI:
    """The page as an ASGI application. Uploads go to the folder that ``TEMPORARY`` names while this is called."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_OwnFilesAlone)
    return gr.mount_gradio_app(
        app,
        make_page(models, examples),
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=list(examples),
        show_error=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=html.CSS,
    )


def make_page(models: Sequence[DemoModel], examples: Sequence[str] = ()) -> gr.Blocks:
    """The picture and the choices on the left, and a column for every model."""
    tasks = list(dict.fromkeys(task for model in models for task in model.tasks))
    with gr.Blocks(title="mvision demo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(html.head(), padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                picture = gr.Image(
                    examples[0] if examples else None,
                    label="Picture",
                    sources=["upload", "webcam", "clipboard"],
                    # A mirrored person would have left and right exchanged.
                    webcam_options=gr.WebcamOptions(mirror=False),
                    type="filepath",
                    buttons=["fullscreen"],
                    height=300,
                    elem_id="picture",
                )
                # The file as it was uploaded: gradio would open it with Pillow, whose errors name no reason.
                picture.preprocess = _path_of
                threshold = gr.Slider(0, 1, THRESHOLD, step=0.01, label="Threshold", elem_id="threshold")
                chosen = gr.CheckboxGroup(
                    tasks, value=tasks, label="Tasks, of one forward pass", visible=len(tasks) > 1, elem_id="tasks"
                )
                if examples:
                    gr.Examples([[file] for file in examples], picture, label="Examples", cache_examples=False)
            outputs: list[Any] = []
            for number, model in enumerate(models):
                with gr.Column(scale=7 if len(models) == 1 else 5, min_width=360, elem_id=f"model-{number}"):
                    gr.HTML(html.about(model), padding=False)
                    shown = gr.Image(
                        label="Result",
                        show_label=False,
                        interactive=False,
                        format="png",
                        buttons=["download", "fullscreen"],
                        elem_classes="mv-result",
                    )
                    outputs += [shown, *[gr.HTML(elem_classes=name, padding=False) for name in ("mv-facts", "mv-rows")]]
        gr.on(
            [page.load, picture.change, threshold.change, chosen.change],
            partial(html.look, models),
            [picture, chosen, threshold],
            outputs,
            trigger_mode="always_last",
            show_progress="minimal",
            concurrency_limit=AT_ONCE,
            api_name="find",
        )
    return page.queue(max_size=WAITING)


def _theme() -> gr.themes.Base:
    """Quiet colours, and fonts that the system has: those of gradio's own themes come from the network."""
    plain = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Helvetica Neue", "Arial", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="emerald",
        neutral_hue="slate",
        radius_size="lg",
        font=plain,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    return theme.set(
        body_background_fill="*background_fill_secondary",
        block_border_width="1px",
        block_label_background_fill="*background_fill_primary",
        block_label_background_fill_dark="*background_fill_primary",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
    )


def _path_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


class _OwnFilesAlone:
    """Sends ``HEADERS`` with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
