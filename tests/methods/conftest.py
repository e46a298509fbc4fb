"""What tests of methods share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pfedgpa_app.data import images as images_module


@pytest.fixture(autouse=True)
def pixels_as_they_are(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Networks see a pixel's value itself, in the hand calculations."""
    if "by_hand" not in request.keywords:
        yield
        return
    monkeypatch.setitem(images_module.NORMALISATION, 1, ((0.0,), (1 / 255,)))
    images_module._mean_and_std.cache_clear()
    yield
    images_module._mean_and_std.cache_clear()
