"""What the console script calls: the command line, or what to install where that is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``onward``; exits with a message where torch or another part of the extra ``torch`` is not installed."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("onward"):
            raise
        sys.exit(
            f"onward's command line needs {error.name}, which is not installed: pip install 'onward[torch]'. Without "
            "it, `python -m onward.runtime.onnx` trains what `onward export` has written."
        )
    run()
