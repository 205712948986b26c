"""Readers of checkpoint layouts: files in, one Checkpoint out."""
