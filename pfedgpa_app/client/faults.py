"""Tell the server when it is the run's network that fails at a client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pfedgpa_app.client.request import ClientRequest
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.models.build import network_of
from pfedgpa_app.models.faults import NetworkError, fault_of, token_range


@contextlib.contextmanager
def network_named(request: ClientRequest) -> Iterator[None]:
    """Turn an error from within the run's network into a NetworkError that names it.

    Other errors pass, and those whose text already tells the user what to do.
    """
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:  # a user's own network may raise anything
        config, schema = request.config, request.schema()
        what = fault_of(error, network_of(config, schema), config.model)
        if not what:
            raise
        if schema.tokens:
            data = request.data()
            held = token_range(part.pixels for part in (data.train, data.validation, data.test))
            what += f"; the tokens of client {request.client} run from {held}"
        raise NetworkError(f"network {config.model} failed: {what}") from error
