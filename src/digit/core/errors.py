"""The errors a user can mend, and the import of optional packages.

Every message says what was given, what was expected, and what to do. The command line prints the message alone and
exits with code 2; ``digit --debug`` shows the traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class DigitError(Exception):
    """A mistake in what the user gave: a path, a value, a file. Its text is complete sentences for that user."""


class MissingPackageError(DigitError):
    """An optional package is needed for what was asked, and is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module needed for ``purpose``, or raise MissingPackageError, which names the ``extra`` with
    it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs the package '{module.split('.')[0]}', which could not be imported ({error}). "
            f"Install it with: pip install 'digit-ar[{extra}]'"
        ) from error
