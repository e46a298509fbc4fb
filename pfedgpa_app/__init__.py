"""pFedGPA: a Flower app whose server generates each client its own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfedgpa_app.dropin import PFedGPA

__version__ = "0.1.0"
__all__ = ["PFedGPA"]


def __getattr__(name: str) -> Any:
    """``PFedGPA`` when it is asked for: Flower and torch take seconds to import."""
    if name == "PFedGPA":
        from pfedgpa_app.dropin import PFedGPA

        return PFedGPA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
