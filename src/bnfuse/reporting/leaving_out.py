"""What cannot be had is left out of a report: the fused model is right all the same, and was verified."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger("bnfuse")


@contextlib.contextmanager
def left_out(what: str) -> Iterator[None]:
    """Go on behind an error, and log what is missing for it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever a model raises in a further run)
        log.info("the report does not say %s: %s", what, error)
