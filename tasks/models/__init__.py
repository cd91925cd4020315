"""Loading, saving and knowing models."""

from tasks.models.applications import Family, family_of
from tasks.models.check import ModelSummary, check_model
from tasks.models.load import load, load_tokenizer, save
from tasks.models.resolve import fingerprint

__all__ = ["Family", "ModelSummary", "check_model", "family_of", "fingerprint", "load", "load_tokenizer", "save"]
