"""Errors that the user can fix, as opposed to bugs."""

from collections.abc import Iterable


class UserError(Exception):
    """One clear line that names the problem and its fix. The command line prints it and exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known name is close to `name`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
