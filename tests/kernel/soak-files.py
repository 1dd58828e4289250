#!/usr/bin/python3
"""Files come, go and are read back, until a file says that it is enough; then their checksums are left.

    soak-files.py FOLDER DONE SUMS SEED
"""
import hashlib
import os
import random
import sys

folder, done, sums, seed = sys.argv[1:]
rng = random.Random(seed)
known = {}


def write(name):
    data = rng.randbytes((1 << rng.randrange(20)) + rng.randrange(4096))
    with open(f"{folder}/{name}.new", "wb") as file:
        file.write(data)
        if rng.random() < 0.7:
            file.flush()
            os.fsync(file.fileno())
    os.rename(f"{folder}/{name}.new", f"{folder}/{name}")
    known[name] = hashlib.sha256(data).hexdigest()


def check(name):
    """From the device, as far as it is there."""
    with open(f"{folder}/{name}", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = hashlib.sha256(file.read()).hexdigest()
    assert found == known[name], f"{name} differs: {found}, not {known[name]}"


while not os.path.exists(done):
    name = str(rng.randrange(40))
    what = rng.random()
    if name not in known or what < 0.5:
        write(name)
    elif what < 0.9:
        check(name)
    else:
        os.remove(f"{folder}/{name}")
        del known[name]

with open(sums, "w") as file:
    for name, digest in known.items():
        print(f"{digest}  {name}", file=file)
