"""The exporter's one exception: a checkpoint that cannot become a bundle, with the reason and the remedy."""

from device.errors import UnderstudyError


class ExportError(UnderstudyError, ValueError):
    """Names the file, key or option, what was expected, what was found, and what to do."""
