"""The content-addressed store of artifacts. Under its root:

- ``artifacts/<key[:2]>/<key>/``: one folder per artifact: its files and ``manifest.json``. No manifest, no artifact.
- ``tmp/<name>/``: scratch folders, each with ``<name>.lock`` beside it, which its process holds.
- ``locks/<key>.lock``: held by whoever makes the artifact; ``locks/.registry``: held for the moment in which a run is
  recorded or artifacts leave.
- ``checkpoints/<key>/``: what a killed step continues from.
- ``quarantine/<key>.<name>/``: damaged artifacts, kept for inspection until ``gc``.
- ``runs/<run>.json``: the keys that a run needs; ``runs/<run>.lease``: held by the run's process.

An artifact is made in a scratch folder. Its files are synced, its manifest is written last and synced, then the
folders; one rename makes it visible, and the sync of the folder that it now stands in makes it last. The manifest has
size and SHA-256 of every file and a checksum of itself, and every read compares them all. All locks are the kernel's,
so a dead process holds none.
"""

from tasks.artifacts.collect import Collected
from tasks.artifacts.files import ArtifactDamaged, ArtifactMissing, StoreError, with_remedy
from tasks.artifacts.locks import LockCancelled
from tasks.artifacts.records import MANIFEST
from tasks.artifacts.runs import RunRecord, working_for
from tasks.artifacts.store import Damage, Entry, Store

__all__ = [
    "MANIFEST",
    "ArtifactDamaged",
    "ArtifactMissing",
    "Collected",
    "Damage",
    "Entry",
    "LockCancelled",
    "RunRecord",
    "Store",
    "StoreError",
    "with_remedy",
    "working_for",
]
