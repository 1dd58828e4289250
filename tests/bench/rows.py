"""What the benchmark measures: servers, rows, limits, and the images they need.

In commands and configurations: $img the image, $size its size, $sock the unix socket, $dir a folder for the server,
$conf the written configuration, $build the build folder, $work the folder of all images, $flat the image of
kind "qcow".
"""

import dataclasses
import operator
import os
import subprocess

OURS = "blkstackd"
MIB = 1 << 20


def daemon(stack):
    """blkstackd with one export made of `stack`."""
    return Setup(
        ["$build/blkstackd", "--config", "$conf"],
        f"""listen = [ "unix:$sock" ];
control = "$dir/control";
exports = ( {{ name = "bench"; stack = ( {stack} ); }} );
""",
    )


@dataclasses.dataclass(frozen=True)
class Setup:
    argv: list
    conf: str = ""


@dataclasses.dataclass(frozen=True)
class Server:
    name: str
    export: str
    setups: dict  # by kind of image; a row whose kind is missing skips the server
    fill: bool = False  # write the whole disk before measuring
    one_client: bool = False  # ends after its first connection


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    kind: str  # of image, see IMAGES
    pattern: str
    bs: str
    depth: int
    conns: int = 1
    flush_every: int = 0
    one_cpu: bool = False  # server and client share one processor: no wake-ups across processors


@dataclasses.dataclass(frozen=True)
class Target:
    row: str
    metric: str  # iops, server_cpu_us; or memory_kib, first_byte_us
    peer: str  # the limit is a ratio to this server; empty: an absolute figure
    holds: object
    limit: float


QEMU_NBD = ["qemu-nbd", "--shared=16", "--persistent", "-k", "$sock"]

# nbdkit behind the nbd layer: compare with nbdkit itself. It ends when blkstackd, its parent by then, does.
NBD_LAYER = Setup(
    [
        "sh",
        "-c",
        "nbdkit --exit-with-parent -f -U $dir/far file $img & "
        "while ! test -S $dir/far; do sleep 0.01; done; "
        "exec $build/blkstackd --config $conf",
    ],
    daemon('{ layer = "nbd"; uri = "nbd+unix:///?socket=$dir/far"; }').conf,
)



def qcow_daemon(options="", image="$img", file=""):
    return daemon(f'{{ layer = "qcow"; {options} }}, {{ layer = "file"; path = "{image}"; {file} }}')


def qemu_cache(size):
    return Setup(QEMU_NBD + ["--image-opts", f"driver=qcow2,l2-cache-size={size},file.filename=$img"])


QEMU_NBD_QCOW = Setup(QEMU_NBD + ["-f", "qcow2", "$img"])

SERVERS = (
    Server(
        "blkstackd",
        "bench",
        {
            "raw": daemon('{ layer = "file"; path = "$img"; }'),
            "qcow": qcow_daemon(),
            "qcow-new": qcow_daemon(),
            "qcow-chain": qcow_daemon('allow-backing = [ "$work" ];'),
            "qcow-span": qcow_daemon('cache = "1M";'),
            "qcow-tables": qcow_daemon('cache = "8M";'),
            "qcow-disk": qcow_daemon(),
            "qcow-direct": qcow_daemon(file='cache = "direct";'),
        },
    ),
    Server("blkstackd-flat", "bench", {"qcow-chain": qcow_daemon(image="$flat")}),
    Server(
        "blkstackd-memory",
        "bench",
        {"raw": daemon('{ layer = "memory"; size = "$size"; }')},
        fill=True,
    ),
    Server("blkstackd-null", "bench", {"raw": daemon('{ layer = "null"; size = "$size"; }')}),
    Server("blkstackd-nbd", "bench", {"raw": NBD_LAYER}),
    Server("nbdkit", "", {"raw": Setup(["nbdkit", "-f", "-U", "$sock", "file", "$img"])}),
    Server(
        "qemu-nbd",
        "",
        {
            "raw": Setup(QEMU_NBD + ["-f", "raw", "$img"]),
            "qcow": QEMU_NBD_QCOW,
            "qcow-new": QEMU_NBD_QCOW,
            "qcow-chain": QEMU_NBD_QCOW,
            "qcow-span": qemu_cache("1M"),
            "qcow-tables": qemu_cache("8M"),
            "qcow-disk": Setup(QEMU_NBD + ["--aio=io_uring", "-f", "qcow2", "$img"]),
            "qcow-direct": Setup(QEMU_NBD + ["--cache=none", "--aio=io_uring", "-f", "qcow2", "$img"]),
        },
    ),
    Server(
        "nbd-server",
        "bench",
        {
            "raw": Setup(
                ["nbd-server", "-d", "-C", "$conf"],
                "[generic]\nunixsock = $sock\n[bench]\nexportname = $img\n",
            )
        },
        one_client=True,
    ),
)

ROWS = (
    Row("randread-4k-qd1", "raw", "randread", "4K", 1),
    Row("randread-4k-qd1-1cpu", "raw", "randread", "4K", 1, one_cpu=True),
    Row("randread-4k-qd16", "raw", "randread", "4K", 16),
    Row("randread-4k-qd64", "raw", "randread", "4K", 64),
    Row("randread-4k-qd4-c16", "raw", "randread", "4K", 4, conns=16),
    Row("randwrite-4k-qd16", "raw", "randwrite", "4K", 16),
    Row("seqread-1m-qd4", "raw", "seqread", "1M", 4),
    Row("qcow-read-4k-qd1", "qcow", "randread", "4K", 1),
    Row("qcow-read-4k-qd16", "qcow", "randread", "4K", 16),
    Row("qcow-read-4k-qd64", "qcow", "randread", "4K", 64),
    Row("qcow-write-4k-qd1", "qcow", "randwrite", "4K", 1),
    Row("qcow-write-4k-qd16", "qcow", "randwrite", "4K", 16),
    Row("qcow-write-4k-qd64", "qcow", "randwrite", "4K", 64),
    Row("qcow-first-4k-qd16", "qcow-new", "randwrite", "4K", 16),
    Row("qcow-first-64k-qd16", "qcow-new", "randwrite", "64K", 16),
    Row("qcow-chain-4k-qd64", "qcow-chain", "randread", "4K", 64),
    Row("qcow-span-4k-qd16", "qcow-span", "randread", "4K", 16),
    Row("qcow-disk-read-4k-qd1", "qcow-disk", "randread", "4K", 1),
    Row("qcow-disk-read-4k-qd16", "qcow-disk", "randread", "4K", 16),
    Row("qcow-disk-read-4k-qd64", "qcow-disk", "randread", "4K", 64),
    Row("qcow-disk-write-4k-qd16", "qcow-disk", "randwrite", "4K", 16),
    Row("qcow-direct-read-4k-qd16", "qcow-direct", "randread", "4K", 16),
    Row("qcow-direct-write-4k-qd16", "qcow-direct", "randwrite", "4K", 16),
)

AT_LEAST, AT_MOST, BELOW = operator.ge, operator.le, operator.lt
SIGNS = {AT_LEAST: ">=", AT_MOST: "<=", BELOW: "<"}
MEMORY, MEMORY_AFTER, FIRST_BYTE = "idle-memory", "idle-memory-after-client", "first-byte"
TABLE_MEMORY = "qcow-table-memory"  # after 8 MiB of tables went through a cache of 8 MiB
MEMORY_ROWS = (MEMORY, MEMORY_AFTER, TABLE_MEMORY)

TARGETS = (
    Target("randread-4k-qd1", "iops", "nbdkit", AT_LEAST, 1.2),
    Target("randread-4k-qd1", "iops", "qemu-nbd", AT_LEAST, 1.5),
    Target("randread-4k-qd1-1cpu", "iops", "nbdkit", AT_LEAST, 1.2),
    Target("randread-4k-qd16", "iops", "nbdkit", AT_LEAST, 1.5),
    Target("randread-4k-qd16", "server_cpu_us", "nbdkit", AT_MOST, 0.6),
    Target("randread-4k-qd16", "iops", "qemu-nbd", AT_LEAST, 4.0),
    Target("randread-4k-qd16", "server_cpu_us", "qemu-nbd", AT_MOST, 0.25),
    Target("randread-4k-qd64", "iops", "nbdkit", AT_LEAST, 1.5),
    Target("randread-4k-qd64", "server_cpu_us", "nbdkit", AT_MOST, 0.6),
    Target("randread-4k-qd64", "iops", "qemu-nbd", AT_LEAST, 4.0),
    Target("randread-4k-qd64", "server_cpu_us", "qemu-nbd", AT_MOST, 0.25),
    Target("randread-4k-qd4-c16", "iops", "nbdkit", AT_LEAST, 1.3),
    Target("randread-4k-qd4-c16", "iops", "qemu-nbd", AT_LEAST, 2.5),
    Target("randwrite-4k-qd16", "iops", "nbdkit", AT_LEAST, 1.3),
    Target("randwrite-4k-qd16", "iops", "qemu-nbd", AT_LEAST, 3.0),
    Target("seqread-1m-qd4", "iops", "nbdkit", AT_LEAST, 1.0),
    Target("seqread-1m-qd4", "iops", "qemu-nbd", AT_LEAST, 2.5),
    Target("qcow-read-4k-qd64", "iops", "qemu-nbd", AT_LEAST, 4.0),
    Target("qcow-read-4k-qd64", "server_cpu_us", "qemu-nbd", AT_MOST, 0.3),
    Target("qcow-write-4k-qd16", "iops", "qemu-nbd", AT_LEAST, 3.0),
    Target("qcow-first-4k-qd16", "iops", "qemu-nbd", AT_LEAST, 3.0),
    Target("qcow-first-4k-qd16", "server_cpu_us", "qemu-nbd", AT_MOST, 0.35),
    Target("qcow-first-64k-qd16", "iops", "qemu-nbd", AT_LEAST, 1.0),
    Target("qcow-chain-4k-qd64", "iops", "blkstackd-flat", AT_LEAST, 0.8),
    Target("qcow-span-4k-qd16", "iops", "qemu-nbd", AT_LEAST, 3.0),
    Target("qcow-disk-read-4k-qd64", "iops", "qemu-nbd", AT_LEAST, 1.5),
    Target("qcow-disk-read-4k-qd64", "server_cpu_us", "qemu-nbd", AT_MOST, 0.5),
    Target(TABLE_MEMORY, "memory_kib", "", AT_MOST, 1.2 * 8192 + 4096),
    Target(MEMORY, "memory_kib", "", BELOW, 4096),
    Target(MEMORY_AFTER, "memory_kib", "", BELOW, 4096),
    Target(FIRST_BYTE, "first_byte_us", "qemu-nbd", AT_MOST, 1.0),
)


def make_raw(path, size):
    """Random bytes; one random piece over and over is as good, nothing looks for repetition."""
    piece = os.urandom(min(size, 64 * MIB))
    with open(path, "wb") as file:
        for at in range(0, size, len(piece)):
            file.write(piece[: size - at])


def tool(*words):
    subprocess.run([str(word) for word in words], stdout=subprocess.DEVNULL, check=True)


def make_qcow(path, size):
    """Every cluster written, one after the other."""
    raw = path.with_suffix(".raw.part")
    make_raw(raw, size)
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()


def make_qcow_new(path, _):
    """Nothing written; so large that hardly a cluster is written twice in a cell."""
    path.unlink(missing_ok=True)
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "64G")


def make_qcow_chain(path, size):
    """Three images, each of which has a third of the disk."""
    third = size // 3 >> 20 << 20
    base, middle_image = path.with_suffix(".base"), path.with_suffix(".middle")
    make_qcow(base, size)
    for below, image, off in (base, middle_image, third), (middle_image, path, 0):
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", image)
        tool("qemu-io", "-c", f"write -P 7 {off} {third}", image)


def make_qcow_span(path, _):
    """All tables are there, and the data is holes in the file: what is measured are the tables."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "64G")


IMAGES = {
    "raw": make_raw,
    "qcow": make_qcow,
    "qcow-new": make_qcow_new,
    "qcow-chain": make_qcow_chain,
    "qcow-span": make_qcow_span,
    "qcow-tables": make_qcow_span,
    "qcow-disk": make_qcow,
    "qcow-direct": make_qcow,
}
ON_DISK = ("qcow-disk", "qcow-direct")  # in the folder of --disk-dir
FRESH = ("qcow-new",)  # made anew for each cell
NEEDS = {"qcow-chain": "qcow"}  # of $flat
