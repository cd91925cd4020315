"""How good an artifact is: one module for each application.

A module has ``MARK``, the column that only its scores have; ``score``, which runs the artifact on every example; and
``sample``, which says what is resampled and what the metrics are.
"""

from __future__ import annotations

from types import ModuleType

from specs.schema.base import Task
from tasks.evaluate.quality import classification, language, speech, translation
from tasks.evaluate.scores import Sample, Scores
from tasks.evaluate.subject import Scored, Subject

APPLICATIONS: dict[Task, ModuleType] = {
    "text-generation": language,
    "text-classification": classification,
    "translation": translation,
    "speech-recognition": speech,
}


def score(subject: Subject) -> Scored:
    """Run the artifact on every evaluation example."""
    return APPLICATIONS[subject.task].score(subject)


def sample(scores: Scores) -> Sample:
    """The units and metrics of kept scores, whichever application they are of."""
    return next(module for module in APPLICATIONS.values() if module.MARK in scores).sample(scores)
