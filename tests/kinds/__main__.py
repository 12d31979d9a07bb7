"""`python -m tests.kinds [NAME ...]`: measure all kinds of model, or some, and write docs/kinds.md."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from pathlib import Path

from edgefl.local_fleet import LocalFleet
from edgefl.training.local import set_threads
from tests.kinds.kinds import KINDS
from tests.kinds.measured import measured, start_devices
from tests.kinds.page import PAGE, read, written

if __name__ == "__main__":
    set_threads(1)
    chosen = [one for one in KINDS if not sys.argv[1:] or one.name in sys.argv[1:]]
    failed = []
    with tempfile.TemporaryDirectory(prefix="edgefl-kinds-") as name, LocalFleet(Path(name)) as fleet:
        start_devices(fleet)
        for kind in chosen:
            if kind.cannot:
                sys.stdout.write(f"{kind.name}: not measured, its row stays as it is: {kind.cannot}\n")
                continue
            start_s = time.monotonic()
            try:
                row = measured(kind, fleet)
            except Exception:  # noqa: BLE001 - the others are measured all the same
                traceback.print_exc()
                failed.append(kind.name)
                continue
            rows = (read(PAGE.read_text("utf-8")) if PAGE.exists() else {}) | {kind.title: row}
            order = [one.title for one in KINDS if one.title in rows]
            PAGE.write_text(written({title: rows[title] for title in order}), "utf-8")
            sys.stdout.write(f"{kind.name}: {row} in {time.monotonic() - start_s:.0f} s\n")
            sys.stdout.flush()
    sys.exit(f"not measured: {', '.join(failed)}" if failed else 0)
