"""How every script ends, apart from stage.py so that those which don't train start faster."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def launch(main: Callable[[], Any]) -> None:
    """Runs a script's `main`; what a user can mend ends it with the message alone."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
