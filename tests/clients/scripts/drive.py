"""Runs one client's checks, in the environment of that client: ``drive.py SCRIPT RESULTS``.

Whatever a script calls ``check_…`` is one check: it passes if it returns. Each becomes a line of
JSON in the file RESULTS. Imports the standard library alone: nothing else is everywhere.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    script, results = Path(sys.argv[1]), Path(sys.argv[2])
    found = runpy.run_path(str(script))
    checks = {name: it for name, it in found.items() if name.startswith("check_")}
    with results.open("w", encoding="utf-8") as file:
        for name, check in checks.items():
            began_at = time.monotonic()
            problem = ""
            try:
                check()
            except Exception as error:  # noqa: BLE001 - whatever a client raises is a finding
                traceback.print_exc()
                problem = f"{type(error).__name__}: {error}"
            result = {
                "name": name.removeprefix("check_"),
                "problem": problem,
                "seconds": time.monotonic() - began_at,
            }
            file.write(json.dumps(result) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
