"""Off the arm: checkpoints in, policy bundles out (see docs/architecture.md)."""
