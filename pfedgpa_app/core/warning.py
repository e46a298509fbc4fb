"""Warnings that are logged only once."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("pfedgpa")


@cache
def warn_once(text: str) -> None:
    """Log ``text``, once in a process.

    The runs of a sweep would otherwise repeat it, and so would the calls in a loop.
    """
    logger.warning(text)
