"""The one error class a user meets: what was wrong, where, and what to write instead.

Anything else that escapes the command line is a bug of ours.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake that the user can mend; the message names the mistake and the mend."""

    def _render_traceback_(self) -> list[str]:
        """What IPython, and so a notebook, shows: the message alone, as the command line does."""
        return [f"{type(self).__name__}: {self}"]


def did_you_mean(name: str, valid: Iterable[str], *, how_many_listed: int = 30) -> str:
    """The tail of an error message: the nearest valid name, and the valid names while they are few."""
    valid = list(dict.fromkeys(valid))
    near = get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return hint + (f" Valid: {', '.join(valid)}." if 0 < len(valid) <= how_many_listed else "")
