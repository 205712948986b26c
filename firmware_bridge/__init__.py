"""From joint positions to servo registers and back, over a serial bus; and the servos' emulation.

This package imports nothing of ours outside itself. The control loop uses `bus` and `calibration`;
set-up and the doctor use `diagnosis`; the virtual cell and the tests use `virtual_servos`.
"""
