"""Write one observation of the virtual cell, for `understudy export --observation`.

The export keeps it: as the input on which every device proves its engine, and as the pictures that a camera's view is
compared with. A person runs this between training and export.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from device.arrays import dump_arrays
from device.durable import write_durably
from device.virtual_world import CAMERAS, VirtualWorld, units_from_rad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=100_000, help="where the cube lies")
    args = parser.parse_args()
    world = VirtualWorld()
    world.reset(args.seed)
    arrays = {f"observation.images.{camera}": world.render(camera) for camera in CAMERAS}
    arrays["observation.state"] = units_from_rad(world.position_rad).astype(np.float32)
    write_durably(args.out, dump_arrays(arrays))
    world.close()


if __name__ == "__main__":
    main()
