"""Every error Outback raises on purpose, by what must happen next.

OutbackError
  ConfigError        the recipe or the command is wrong      -> stop before anything starts (exit code 2)
  SchemaError        code and table disagree                 -> stop the job: a bug
  RowError           this one item cannot be processed       -> a row in `attempts` with the reason; the job goes on
  FailureRateError   too many items failed                  -> the job fails at its end; what succeeded is kept (exit code 1)
  TransientError     storage or network hiccup               -> retried with a limit, then raised

A message says what was found, what was expected and what to do. Errors cross process borders, so they survive pickling.
"""

from collections.abc import Mapping


class OutbackError(Exception):
    """Root of every error raised on purpose."""


class ConfigError(OutbackError):
    """The recipe, an option or the environment is wrong: nothing has been started."""


class SchemaError(OutbackError):
    """Rows do not fit their table: a bug in a stage, never a matter of data quality."""


class RowError(OutbackError):
    """One item cannot be processed. `reason` is the short, stable name that `attempts.error_class` stores.

    `terminal` says whether trying the same bytes again is pointless (an unreadable file) or not (a full disk).
    """

    def __init__(self, reason: str, message: str, *, terminal: bool = True) -> None:
        super().__init__(reason, message, terminal)
        self.reason = reason
        self.message = message
        self.terminal = terminal

    def __reduce__(self) -> tuple[object, ...]:
        return (_row_error, (self.reason, self.message, self.terminal))

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class FailureRateError(OutbackError):
    """More items of a job failed than its recipe allows. `counts` is what the job's run records of it."""

    def __init__(self, message: str, counts: Mapping[str, object]) -> None:
        super().__init__(message, counts)
        self.counts = counts

    def __str__(self) -> str:
        return str(self.args[0])


class TransientError(OutbackError):
    """Storage or network failed in a way that may pass."""


def _row_error(reason: str, message: str, terminal: bool) -> RowError:
    return RowError(reason, message, terminal=terminal)
