"""The exceptions of the device side: one small tree, each also a built-in kind.

Every message is a sentence for the person who can act: what was expected, what was found, where, what to do. The
command prints the message of an UnderstudyError as it is and exits with 1; anything else is a defect and keeps its
traceback.
"""


class UnderstudyError(Exception):
    """Root of what the project raises on purpose."""


class ConfigError(UnderstudyError, ValueError):
    """A cell file that cannot be used: names file, key and remedy."""


class BundleError(UnderstudyError, ValueError):
    """A policy bundle that is damaged, of an unknown schema, or does not fit the cell."""


class DeviceUnavailableError(UnderstudyError, OSError):
    """A camera or a serial adapter that is not there or went away."""
