"""How benchmarks end that run recipes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mates.engine.config import RecipeError


def exit_code(name: str, work: Callable[[], int]) -> int:
    """What ``work`` returns; 2 for a bad recipe or option, 1 for a failed step or file, 130 where it was interrupted; messages are told
    under ``name``."""
    from mates.launchers.errors import user_errors

    try:
        return work()
    except RecipeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except user_errors() as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{name}: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on", file=sys.stderr)
        return 130
