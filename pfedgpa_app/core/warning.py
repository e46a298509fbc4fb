"""What a user should know, said once."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("pfedgpa")


@cache
def warn_once(text: str) -> None:
    """Log ``text``, once in a process: runs of a sweep are alike, and so are calls of a loop."""
    logger.warning(text)
