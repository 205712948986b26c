"""Threads that each work on a batch of their own, which small convolutions in one dimension gain by.

torch's own threads divide one operation, and with operations this small they mostly wait for each other. The training
gives every worker a part of its batch, the gate some of its observations.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """`count` threads in which torch uses no further ones; with 1 (a GPU's batch is not divided), one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # How many threads an operation gets is a setting of the thread that asks for it.
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
