"""Errors that are addressed to the person at the keyboard; the command line prints them in one line, exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches

NO_TEXT = "backslashreplace"  # how the bytes of a file name that are no UTF-8 are written, as "\\udcff"


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what was expected and where from."""


class DirectionError(UserError):
    """A mixer that is not causal where a causal one is needed."""


def as_text(name: str) -> str:
    """Return a file's name with the bytes that are no UTF-8 written as backslashes."""
    return name.encode(errors=NO_TEXT).decode()


def suggest(name: str, known: Iterable[str], *, limit: int = 12) -> str:
    """Return ", did you mean 'x'?" for the nearest of `known`, else the start of the list of what exists.

    The one that begins with `name` is nearest: accuracy, not mcc, for acc. Names with commas in them are quoted.
    """
    names = sorted(known)
    longer = [other for other in names if name and other.startswith(name)]
    if close := longer if len(longer) == 1 else get_close_matches(name, names, n=1, cutoff=0.5):
        return f", did you mean {close[0]!r}?"
    if not names:
        return "; there are none"
    listed = [repr(name) if "," in "".join(names) else name for name in names[:limit]]
    return f"; known: {', '.join(listed)}" + (", ..." if len(names) > limit else "")


def of_module(error: Exception) -> Exception:
    """Return what tells the user of a module that is not installed, and any other error as it is."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if not name or name.partition(".")[0] == "mambaverse":
        return error
    return UserError(f"no module {name!r}, which this needs: `pip check` says what mambaverse lacks")


def of_import(error: BaseException, module: str) -> str:
    """Return in one line why `module` cannot be imported, and, where its file is here, by what name Python finds it."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    file = module.removesuffix(".py")
    first = file.partition(".")[0] if file == module else file
    missing = isinstance(error, ModuleNotFoundError) and error.name == first
    here = next((path for path in (f"{first}.py", first) if os.path.exists(path)), None)
    if here and (missing or file != module):
        folder, name = os.path.split(first)
        return f"{reason}; {here} is the module {name!r}, which Python finds with PYTHONPATH={folder or '.'}"
    return reason


def warn(text: str) -> None:
    """Print `text` on stderr, once where several processes train: something to know that stops nothing."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def leave_stdout() -> None:
    """Send what is still to be printed nowhere, since stdout takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
