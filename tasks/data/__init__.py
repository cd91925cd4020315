"""Reading, checking and encoding data."""

from tasks.data.encode import encode
from tasks.data.encoded import Encoded, open_encoded
from tasks.data.fingerprint import fingerprint
from tasks.data.preflight import DataSummary, preflight

__all__ = ["DataSummary", "Encoded", "encode", "fingerprint", "open_encoded", "preflight"]
