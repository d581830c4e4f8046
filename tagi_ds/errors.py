"""The one exception for what a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: says what is wrong, names the file or field, and how to mend it.

    Launchers print its text alone, without a traceback, and exit with status 2.
    """

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"{problem}\n  mend: {mend}")
        self.problem = problem
        self.mend = mend
