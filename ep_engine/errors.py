"""The two ways a command ends badly, and the exit status of each.

A `UserError` is one sentence: what must hold, the values that were given, what to do. It is raised before any process
group, memory or output exists. A `Fault` happened on the way: NaN, a full disk, a dead peer.
"""


class UserError(ValueError):
    """The user asked for something impossible; the command prints the sentence and exits with status 2."""

    exit_status = 2


class Fault(RuntimeError):
    """Something broke while running; the command prints the sentence and exits with status 1, `NoRoom` with 2."""

    exit_status = 1

    def __init__(self, sentence: str, *, everywhere: bool = False) -> None:
        """`everywhere`: all ranks raise the same, so that one of them need say it."""
        super().__init__(sentence)
        self.everywhere = everywhere


class NoRoom(Fault):
    """A disk is full, which the user alone can mend."""

    exit_status = 2
