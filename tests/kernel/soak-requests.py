#!/usr/bin/python3
"""Requests one after the other that go to the device: each block is written, and read back a while later.

    soak-requests.py FILE DONE

Counts them in the file `requests`, and tells in `longest` how long the longest took so far in each phase that the
file `phase` told of. A request that began in one phase and ended in another counts for the one it ended in.
"""
import mmap
import os
import sys
import time

BLOCK = 4096
BLOCKS = 64

path, done = sys.argv[1:]
fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
buffer = mmap.mmap(-1, BLOCK)
longest = {}


def phase():
    with open("phase") as file:
        return file.read().strip()


def tell(name, *lines):
    """Readers find the file whole."""
    with open(f"{name}.new", "w") as file:
        print(*lines, sep="\n", file=file)
    os.rename(f"{name}.new", name)


def timed(call, *args):
    began, first = time.monotonic(), phase()
    assert call(fd, *args) == BLOCK
    took, last = time.monotonic() - began, phase()
    name = "keeper" if "keeper" in (first, last) else last or first
    if took > longest.get(name, 0):
        longest[name] = took
        tell("longest", *(f"longest request, {name} killed: {took * 1000:.0f} ms" for name, took in longest.items()))


def content(number):
    return number.to_bytes(8, "big") * (BLOCK // 8)


number = 0
while not os.path.exists(done):
    buffer[:] = content(number)
    timed(os.pwrite, buffer, number % BLOCKS * BLOCK)
    old = max(0, number - BLOCKS // 2)
    timed(lambda fd, at: os.preadv(fd, [buffer], at), old % BLOCKS * BLOCK)
    assert buffer[:] == content(old), f"block of request {old} differs"
    number += 1
    tell("requests", number)
    time.sleep(0.01)
