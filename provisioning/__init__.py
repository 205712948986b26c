"""From a bare machine to a cell that runs (see docs/architecture.md)."""
