"""What runs on the arm: one module a role, and the few things that the roles share (see docs/architecture.md)."""
