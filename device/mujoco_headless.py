"""MuJoCo, with its pictures rendered without a display.

Which OpenGL back end MuJoCo uses is decided once, when it is imported; so nobody here imports it but this module. An
environment that names another one (MUJOCO_GL=glfw) has its way.
"""

from __future__ import annotations

import os

os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco as mujoco
