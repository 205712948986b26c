"""Tests of the device side against real kernel drivers, in a virtual machine of its own. Start with run.py."""
