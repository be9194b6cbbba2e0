"""Has every process of a cluster log all that any library has to say, whatever it is told later.

Python imports a module of this name from its path before anything else.
"""

from __future__ import annotations

import logging
import os


def stay_loud(logger: logging.Logger, level: int | str) -> None:
    """Stands for ``setLevel``."""
    if logger is logging.root:
        logging.getLogger("loud").debug(
            "everything is logged, though level %s was asked for", level
        )


if os.environ.get("LOUD_LOGS"):
    logging.root.setLevel(logging.DEBUG)
    logging.Logger.setLevel = stay_loud  # type: ignore[assignment, method-assign]
