# SPDX-License-Identifier: Apache-2.0
"""The versions of TRL and transformers whose private names this package was tested with (docs/compatibility.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version


TESTED = {"trl": "1.15.0 to 1.16.0", "transformers": "4.56.2 to 5.24.0"}


@contextmanager
def private_names() -> Iterator[None]:
    """Where the block misses a name of TRL or transformers, an `ImportError` that names it and the tested versions."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        found = " and ".join(f"{name} {version(name)} (tested: {tested})" for name, tested in TESTED.items())
        raise ImportError(
            f"trl_selfdistill relies on a private name that is not there: {error}. Found {found}. Install tested "
            "versions, or a newer trl-selfdistill."
        ) from error
