"""What the runtimes of exported files raise."""


class InputError(ValueError):
    """The file is not one that this runtime runs, or the input does not fit it: what is wrong and the remedy."""
