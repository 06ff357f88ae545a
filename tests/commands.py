"""Commands as a user types them."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*words, code: int = 0, cwd: Path = ROOT, typed: str = "", **environment: str):
    """The finished process with its `stdout` and `stderr`, which has to end with `code`."""
    result = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env=os.environ | environment,
        input=typed,
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-4000:]
    return result
