"""What runs inside the virtual machine: hardware in software, and the checks of the device side against it."""
