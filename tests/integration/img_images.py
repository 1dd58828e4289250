"""What the tests of blkstack-img share: running it and qemu-img, and images that qemu-img makes."""

import json
import os
import random
import subprocess

IMG = os.path.join(os.environ["BUILD"], "blkstack-img")
SCRATCH = os.environ["SCRATCH"]
CLEAN_KEYS = ["image-end-offset", "corruptions", "leaks", "check-errors", "total-clusters",
              "allocated-clusters", "fragmented-clusters", "compressed-clusters"]


def run(*command, status=0, **options):
    """Standard output; the exit status must be `status` (None: any), and no signal ever."""
    result = subprocess.run([str(word) for word in command], capture_output=True, timeout=120,
                            **options)
    if result.returncode < 0 or (status is not None and result.returncode != status):
        raise AssertionError(f"{command}: exit status {result.returncode}, not {status}\n"
                             f"{result.stdout.decode(errors='replace')[-3000:]}\n"
                             f"{result.stderr.decode(errors='replace')[-3000:]}")
    run.status, run.stderr = result.returncode, result.stderr.decode(errors="replace")
    return result.stdout


def img(*command, status=0):
    return run(IMG, *command, status=status)


def check(path):
    """Our counts, or None when the check could not be done."""
    out = img("check", "--json", path, status=None)
    return json.loads(out) if out else None


def qemu_check(path):
    out = run("qemu-img", "check", "-f", "qcow2", "--output=json", path, status=None)
    return json.loads(out) if out.strip().startswith(b"{") else None


def counts(answer):
    return {key: answer.get(key, 0) for key in CLEAN_KEYS}


def path_of(name):
    return os.path.join(SCRATCH, name)


class Image:
    """An image made by qemu-img: kinds of content are added one by one, as a seeded random decides."""

    def __init__(self, name, seed, **options):
        self.path, self.random = path_of(name), random.Random(seed)
        self.size = options.pop("size", 8 << 20)
        self.options = options
        if os.path.exists(self.path):
            os.remove(self.path)
        words = [f"{key}={value}" for key, value in options.items()]
        run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", ",".join(words)] if words else []),
            self.path, self.size)

    def io(self, *commands):
        words = [word for command in commands for word in ("-c", command)]
        run("qemu-io", "-f", "qcow2", *words, self.path)

    def range(self, max_len=1 << 18):
        length = self.random.randrange(512, max_len) & ~511
        return self.random.randrange(0, self.size - length) & ~511, length

    def fill(self, count=8):
        kinds = ["write -P 0x%02x", "write -P 0x%02x", "write -z", "write -z -u", "discard"]
        commands = []
        for _ in range(count):
            kind, (off, length) = self.random.choice(kinds), self.range()
            if "%" in kind:
                kind %= self.random.randrange(1, 256)
            commands.append(f"{kind} {off} {length}")
        self.io(*commands)

    def fill_compressed(self, count=4):
        cluster = int(self.options.get("cluster_size", 65536))
        for _ in range(count):
            off = self.random.randrange(0, self.size // cluster) * cluster
            # Fails where the cluster is there already: version 7.2 does not overwrite with compressed data.
            run("qemu-io", "-f", "qcow2", "-c", f"write -c -P {self.random.randrange(256)} {off} "
                f"{cluster}", self.path, status=None)

    def snapshot(self, name):
        run("qemu-img", "snapshot", "-c", name, self.path)

    def bitmap(self, name):
        run("qemu-img", "bitmap", "--add", "--enable", self.path, name)


def matrix():
    """(name, options) of images over the whole range of the format."""
    for version in ("0.10", "1.1"):
        for cluster in (512, 4096, 65536, 2 << 20):
            yield f"v{version}-c{cluster}", dict(compat=version, cluster_size=cluster)
    for bits in (1, 2, 4, 8, 32, 64):
        yield f"r{bits}", dict(refcount_bits=bits, cluster_size=4096)
        yield f"r{bits}-c64k", dict(refcount_bits=bits)
    for cluster in (16384, 65536, 2 << 20):
        yield f"x-c{cluster}", dict(extended_l2="on", cluster_size=cluster)
    yield "lazy", dict(lazy_refcounts="on", cluster_size=4096)
    yield "zstd", dict(compression_type="zstd", cluster_size=8192)
    yield "metadata", dict(preallocation="metadata", cluster_size=4096)
