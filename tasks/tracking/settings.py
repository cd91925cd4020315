"""Where MLflow is, and what of it is switched off."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from specs.schema.redaction import redact

HARDENED: Mapping[str, str] = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SERVER_JOB_ENABLE_PERIODIC_TASKS": "false",
    "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS": "false",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_LOG_UV_FILES": "false",
    # Agents that MLflow detects would be addressed on the terminal at its import.
    "MLFLOW_DISABLE_AGENT_HINT": "true",
}
"""Forced, whatever the user's environment says: nothing here needs these parts, and each was a way in."""

PREFERRED: Mapping[str, str] = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_PRINT_MODEL_URLS_ON_CREATION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
}
"""Set where the user did not: the journal repeats what failed, so MLflow itself need not be patient."""

_NOISY = ("mlflow", "alembic", "sqlalchemy", "urllib3", "git")


class TrackingError(Exception):
    """MLflow could not be given the record now; the record itself is safe on disk."""


class Refused(Exception):
    """This one thing will never be sent; what comes after it can be."""


def harden_environment() -> None:
    """Switch off, for this process and those it starts, what of MLflow is unsafe or talks to others.

    It has to run before ``mlflow`` is imported, and before ``mlflow ui`` or ``mlflow server`` is started.
    """
    os.environ.update(HARDENED)
    for name, value in PREFERRED.items():
        os.environ.setdefault(name, value)


def tracking_uri(home: Path) -> str:
    """``MLFLOW_TRACKING_URI`` where it is set, else a SQLite file under ``home``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


def shown(uri: str) -> str:
    """The address without the password that it may carry."""
    return redact(uri, ())


def silence(log: Path) -> None:
    """Send the warnings of MLflow and what it stands on to ``log`` and nothing to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in _NOISY:
        logger = logging.getLogger(name)
        for old in [old for old in logger.handlers if isinstance(old, logging.FileHandler)]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
