#!/bin/sh
# Makes .venv-lerobot: an environment with the real LeRobot 0.4.4 on the CPU, the newest for Python 3.10 and 3.11. Tests
# hold our export, calibration and virtual servos against it; the demo's policy is trained with it. About 3 GB.
set -eu
cd "$(dirname "$0")/.."
env=.venv-lerobot
[ -e "$env/.ready" ] && exit 0
"${PYTHON:-python3}" -m venv "$env"
install="$env/bin/python -m pip install --quiet --disable-pip-version-check"
$install torch==2.13.0
$install --no-deps torchvision==0.28.0
$install "numpy<2.3" "Pillow<13" "setuptools<81" einops draccus==0.10.0 "huggingface-hub>=0.34.2,<0.36" safetensors \
  "gymnasium>=1.1.1,<2" termcolor "packaging<26" jsonlines deepdiff "diffusers>=0.30,<0.36" "datasets>=4.0,<5" \
  "av>=15,<16" "imageio[ffmpeg]" pyserial "opencv-python-headless<4.13" "accelerate>=1.10,<2" pandas pyarrow tqdm \
  psutil simplejpeg mujoco onnxruntime
$install --no-deps lerobot==0.4.4 feetech-servo-sdk

# torchvision's wheels are built for CUDA; beside a CPU build of torch its compiled part does not load, and its Python
# part stops at two operators that nobody here calls. Declaring their schemas lets models and transforms import.
"$env/bin/python" - <<'PATCH'
import importlib.util
from pathlib import Path

file = Path(importlib.util.find_spec("torch").origin).parent.parent / "torchvision" / "extension.py"
text = file.read_text()
if "declared_for_cpu" not in text:
    file.write_text(text + '''

if not _has_ops():
    declared_for_cpu = torch.library.Library("torchvision", "DEF")
    declared_for_cpu.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    declared_for_cpu.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
''')
PATCH
HF_HUB_OFFLINE=1 "$env/bin/python" -c "
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.motors.feetech import FeetechMotorsBus"
touch "$env/.ready"
