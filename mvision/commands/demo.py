"""``mvision demo``: the page to try weights on, from its options to the server."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from mvision.commands.predict import left_out_of_pictures, newest_run, sample_images
from mvision.config import config_of_run
from mvision.data.formats.layouts import is_at_hand
from mvision.deploy.demo_model import DemoModel
from mvision.deploy.runtimes import open_fastest
from mvision.errors import UserError
from mvision.heads import head_class
from mvision.machine import keep_freed_memory, resolve_device
from mvision.structures.messages import decoder_messages_hidden

MOST_MODELS = 2  # that fit beside each other on a screen
EXAMPLES = 6
EVERY_ADDRESS = ("0.0.0.0", "::")


def demo_job(
    weights: Sequence[str] = (),
    *,
    family: str | None = None,
    tasks: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Open the weights and serve the page; returns when a signal has ended it, with that signal's exception.

    Args:
        weights, family: up to two sources that ``mvision.load`` takes; none: the newest run with the tasks.
        tasks: the tasks to run; empty: all that the weights have.
        host, port: where to listen; port 0: any free one.
        device: None: the first GPU, else the CPU.
        log: is called with lines on the models and with the address.

    Raises:
        UserError: the package gradio is missing, host or port cannot be used, or the weights cannot.
    """
    for task in tasks:
        head_class(task)
    if len(weights) > MOST_MODELS:
        raise UserError(f"--weights: {len(weights)} were given; the page compares {MOST_MODELS}, side by side")
    if find_spec("gradio") is None:
        raise UserError("the package gradio is missing: pip install 'gradio>=6' (mvision's extra [demo])")
    sources = list(weights) or [str(newest_run(tasks))]
    with _listener(host, port) as listener, decoder_messages_hidden():  # taken before the weights are read
        keep_freed_memory()
        # One thread for all passes: the time of a pass is its own, not that of two people who share the cores.
        thread = ThreadPoolExecutor(1, "demo-model")
        models = []
        for source in sources:
            model, runtime = open_fastest(source, tasks, resolve_device(device), family=family)
            log("\n".join([f"{source}: {runtime}", *left_out_of_pictures(model.tasks)]))
            models.append(DemoModel(source, model, runtime, thread))
        examples, obstacle = _examples(sources[0])
        log("\n".join([*obstacle, "starting the page ..."]))
        _serve(models, examples, listener, lambda: log(_address(host, listener)))


def _serve(
    models: Sequence[DemoModel], examples: Sequence[str], listener: socket.socket, ready: Callable[[], None]
) -> None:
    from mvision.deploy.demo_page import serve  # imports gradio, for seconds that mistakes need not wait for

    serve(models, examples, listener, ready)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody else takes the port while the weights are read.

    Raises:
        UserError: the port is taken, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no address (127.0.0.1: this machine alone; 0.0.0.0: every machine)") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port is taken for a minute after use
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            other = f"{port + 1}" if port < 65535 else "7860"
            reason = f"--port {port}: taken by another program; choose another, such as {other}, or 0 for any free one"
        elif error.errno == errno.EACCES:
            reason = f"--port {port}: not allowed for this user; choose one from 1024 on, or 0 for any free one"
        else:
            reason = f"--host {host}: not an address of this machine ({(error.strerror or str(error)).lower()})"
        raise UserError(reason) from error
    return listener


def _address(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    shown = "127.0.0.1" if host in EVERY_ADDRESS else f"[{host}]" if ":" in host else host
    others = "; every machine that reaches this one can open it" if host in EVERY_ADDRESS else ""
    return f"http://{shown}:{port}/ (Ctrl-C ends it{others})"


def _examples(source: str) -> tuple[list[str], list[str]]:
    """Pictures of the data that the weights were trained on, and a line where there are none.

    The built-in data set is not generated for them, which takes minutes.
    """
    run = config_of_run(source)
    if not is_at_hand(None if run is None else run.data.root):
        how = "mvision data check generates it"
        return [], [f"no example pictures: the built-in data set is not on this machine ({how})"]
    try:
        return sample_images(source, EXAMPLES), []
    except UserError as error:
        return [], [f"no example pictures: {error}"]
