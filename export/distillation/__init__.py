"""Distillation: a student that answers in one to four steps, out of a diffusion policy that takes a hundred."""
