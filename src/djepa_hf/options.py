"""Misspelt options: found before they do harm, with the one that was meant."""

import difflib
from collections.abc import Iterable


def check_options(given: Iterable[str], known: Iterable[str]):
    """
    Raises a `ValueError` for the first option that does not exist, with the closest one.

    Args:
        given (iterable of `str`): names of options.
        known (iterable of `str`): those that exist.
    """
    known = list(known)
    for name in given:
        if name not in known:
            closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"There is no option {name!r}; did you mean {closest!r}?")
