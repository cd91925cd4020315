"""MLflow: the journal of a run is replayed to it, during the run and, where that failed, later."""

from tasks.tracking.sender import Status, Tracker, run_address, upload
from tasks.tracking.settings import TrackingError, harden_environment, tracking_uri
from tasks.tracking.store import answers, prepare_store
from tasks.tracking.summary import result_step

__all__ = [
    "Status",
    "Tracker",
    "TrackingError",
    "answers",
    "harden_environment",
    "prepare_store",
    "result_step",
    "run_address",
    "tracking_uri",
    "upload",
]
