"""Door 1: the Flower ServerApp. It reads the configuration and runs the experiment."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.runs.experiment import run
from pfedgpa_app.server.nodes import NodesError
from pfedgpa_app.server.screening import NoUploadsError

app = ServerApp()
TOLD = ConfigError, DataError, NodesError, NoUploadsError  # their text is all that a user needs

logger = logging.getLogger("pfedgpa")  # the run's messages go where Flower's go
logger.setLevel(logging.INFO)
logger.handlers = logging.getLogger("flwr").handlers


class Plain(logging.Filter):
    """Shows errors that a user can mend by their text alone, without traceback and exit code."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether Flower is to print ``record``; such an error loses its traceback here."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, TOLD):
            record.msg, record.args, record.exc_info = "%s", (str(error),), None
            self.told = True
        return not (self.told and record.getMessage().startswith("Exit Code"))


logging.getLogger("flwr").addFilter(Plain())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every configured method on one partition and seed, and write the results."""
    run(grid, resolve(context.run_config))
