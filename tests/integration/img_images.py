"""What the tests of blkstack-img share: running it and qemu-img, and images that qemu-img makes."""

import json
import os
import random
import resource
import struct
import subprocess

IMG = os.path.join(os.environ["BUILD"], "blkstack-img")
SCRATCH = os.environ["SCRATCH"]
# Damaged images make programs write at absurd offsets; with SIGXFSZ ignored they get an error instead.
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
CLEAN_KEYS = ["image-end-offset", "corruptions", "leaks", "check-errors", "total-clusters",
              "allocated-clusters", "fragmented-clusters", "compressed-clusters"]


def run(*command, status=0, **options):
    """Standard output; the exit status must be `status` (None: any), and no signal ever."""
    result = subprocess.run([str(word) for word in command], capture_output=True, timeout=120, restore_signals=False,
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
        self.options, self.snapshots = options, []
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


def make_full(name, options, seed_here):
    """An image of that kind with data, holes, compressed clusters, snapshots and bitmaps."""
    image = Image(name, seed_here, size=4 << 20, **options)
    image.fill()
    image.fill_compressed()
    if options.get("refcount_bits") != 1 and "preallocation" not in options:
        for snapshot in ("one", "two"):
            image.snapshot(snapshot)
            image.fill(4)
    if options.get("compat") != "0.10":
        image.bitmap("b0")
        image.fill(2)
    return image.path


def tables(data):
    """Where metadata lies: (offset, length), for damage that matters."""
    cluster_bits, l1_count, l1_off, rt_off, rt_clusters, snapshots, snapshots_off = (
        struct.unpack_from(">I", data, 20)[0], *struct.unpack_from(">IQQIIQ", data, 36))
    cluster = 1 << cluster_bits
    found = [(l1_off, l1_count * 8), (rt_off, 64)]
    if snapshots:
        found.append((snapshots_off, snapshots * 64))
    word = lambda off: struct.unpack_from(">Q", data, off)[0] if off + 8 <= len(data) else 0
    for i in range(min(l1_count, 64)):
        if word(l1_off + i * 8) & 0x00fffffffffffe00:
            found.append((word(l1_off + i * 8) & 0x00fffffffffffe00, cluster))
    for i in range(8):
        if word(rt_off + i * 8):
            found.append((word(rt_off + i * 8), cluster))
    return [(off, min(length, len(data) - off)) for off, length in found if off + 8 < len(data)]


def damage(data, rng):
    """The image with some 64-bit words of its metadata changed, or cut short."""
    data, cluster = bytearray(data), 1 << struct.unpack_from(">I", data, 20)[0]
    places = tables(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        off, length = rng.choice(places)
        used = [at for at in range(off, off + length - 7, 8) if any(data[at:at + 8])]
        at = rng.choice(used) if used and rng.random() < 0.8 else off + rng.randrange(length // 8) * 8
        kind = rng.randrange(6)
        if kind == 0:
            data[at + rng.randrange(8)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + 8] = bytes(8)
        elif kind == 2:  # points somewhere in the file
            value = rng.randrange(len(data) // cluster + 2) * cluster
            data[at:at + 8] = struct.pack(">Q", value | rng.choice((0, 1 << 63, 1)))
        elif kind == 3:
            data[at:at + 8] = struct.pack(">Q", rng.randrange(1 << 64))
        elif kind == 4:
            other = rng.choice(places)[0] & ~7
            data[at:at + 8] = data[other:other + 8]
        else:
            data[at] ^= 0x80
    if rng.random() < 0.1:
        del data[rng.randrange(len(data) // 2, len(data)):]
    return bytes(data)
