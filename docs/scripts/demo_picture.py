"""A picture of the page of ``mvision demo``, as a browser shows it.

    python docs/scripts/demo_picture.py runs/detection/1 docs/demo.jpg

Starts the page on a free port, opens it in Chromium without a window, waits for the result of the first example, and
writes what is seen. Needs the extra ``demo``, the package playwright and a Chromium (``--chromium`` names its program).
The time on the page is that of the first forward pass which the page asks for, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1360, 1010  # pixels
QUALITY = 88  # of the JPEG


def main() -> None:
    """Serve, look, and stop serving."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", nargs="+", help="one or two sources")
    add("output", type=Path)
    add("--chromium", default="/usr/bin/chromium", help="[default: %(default)s]")
    add("--dark", action="store_true", help="as browsers with dark colours show it")
    options = parser.parse_args()
    command = [sys.executable, "-m", "mvision", "demo", "--port", "0"]
    command += [word for weights in options.weights for word in ("--weights", weights)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
            shoot(address, options.output, options.chromium, options.dark)
        finally:
            server.terminate()


def shoot(address: str, output: Path, chromium: str, dark: bool) -> None:
    """Wait until every model has shown its result, and write the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="dark" if dark else "light")
        page.goto(address)
        page.wait_for_selector(".mv-facts >> text=forward pass", timeout=120_000)
        page.wait_for_timeout(3000)  # for the pictures of the examples
        page.screenshot(path=output.with_suffix(".png"))
        browser.close()
    if output.suffix != ".png":
        with Image.open(output.with_suffix(".png")) as picture:
            picture.convert("RGB").save(output, quality=QUALITY)
        output.with_suffix(".png").unlink()


if __name__ == "__main__":
    main()
