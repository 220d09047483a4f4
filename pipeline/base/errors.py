"""The two ways a run ends badly: the user can mend it (exit 2), or something failed (exit 1)."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names the value and the remedy. Exit code 2."""


class RunError(RuntimeError):
    """A step failed although its input was sound (an engine that does not build, say). Exit code 1."""
