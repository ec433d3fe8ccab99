"""The ``mates`` command: ``mates VERB [RECIPE.yaml] [--dotted.name VALUE …]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mates.engine.config import RecipeError
from mates.engine.pretrain.vigilance import STOPPED, StopRequestedError
from mates.launchers.errors import STEP_FAILED, user_errors
from mates.launchers.verbs import VERBS

Handler = Callable[[list[str]], int]
BAD_PATHS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""Errors of the system that another attempt would meet again; those of a disk or a network may pass."""


def usage() -> str:
    """The top-level help."""
    lines = [
        "usage: mates VERB [RECIPE.yaml] [--dotted.name VALUE ...]",
        "",
        "Model-aware selection of pretraining data. One recipe file holds everything; any value can be overridden by its dotted name.",
        "",
        "verbs:",
        *(f"  {name:<14} {verb.summary}" for name, verb in VERBS.items()),
        "",
        "`mates VERB --help` explains every field of the recipe; `mates VERB RECIPE --print_config` prints the resolved recipe.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 a step failed, 2 a bad recipe, argument or input, 75 stopped as a signal
    asked, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"mates {version('mates')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        print(f"mates: unknown verb {name!r}; expected one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[name].run(rest)
    except SystemExit:  # of --help: whatever else is caught is imported first
        raise
    except StopRequestedError as stop:
        print(f"mates {name}: {stop}", file=sys.stderr)
        return STOPPED
    except RecipeError as error:
        print(f"mates {name}: {error}", file=sys.stderr)
        return 2
    except user_errors() as error:
        print(f"mates {name}: {error}", file=sys.stderr)
        return 1 if isinstance(error, STEP_FAILED) else 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"mates {name}: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 2 if isinstance(error, BAD_PATHS) else 1
    except KeyboardInterrupt:
        print(f"\nmates {name}: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
