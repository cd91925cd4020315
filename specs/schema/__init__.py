"""The pydantic models of a spec; nothing here imports anything heavier than pydantic."""
