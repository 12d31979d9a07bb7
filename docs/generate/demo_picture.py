"""Draw the output of a real `edgefl demo` as the README's picture: `python -m docs.generate.demo_picture`.

Nothing in the SVG is loaded from the network; the reader's own monospaced font is used.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

TARGET = Path(__file__).parents[1] / "assets" / "demo.svg"
WIDTH = 100  # characters
_LONG = re.compile(r"(?:(?:round \d+/|  device-0 ).*\n){6,}")  # lines of the same kind


def main() -> None:
    """Run the demo, and write the picture."""
    command = [sys.executable, "-m", "edgefl", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    TARGET.write_text(picture(done.stdout), encoding="utf-8")


def picture(said: str) -> str:
    """Return an SVG of a terminal with the command and its output."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), "edgefl demo"))
    console.print(Text(_LONG.sub(_shortened, said.rstrip()), no_wrap=True))
    svg = console.export_svg(title="edgefl demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def _shortened(found: re.Match[str]) -> str:
    """Return the first two and the last two of many lines."""
    lines = found[0].splitlines(keepends=True)
    return "".join([*lines[:2], "  ...\n", *lines[-2:]])


if __name__ == "__main__":
    main()
