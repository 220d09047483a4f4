"""The two ways a run ends badly: the user can mend it (exit 2), or something failed (exit 1)."""

from pydantic import ValidationError


class InputError(ValueError):
    """What the user gave cannot be used; the message names the value and the remedy. Exit code 2."""


class RunError(RuntimeError):
    """A step failed although its input was sound (an engine that does not build, say). Exit code 1."""


class ElsewhereError(RunError):
    """Another of the processes that were started together failed, and says why itself. `code`: its exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """What a library's error says, or else what it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_problem(error: ValidationError) -> str:
    """The first complaint of a pydantic error, on one line, with where it stands."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
