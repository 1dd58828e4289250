"""Runs servers and clients, and keeps what they measured: Bench is one whole run, Running one server alive."""

import ctypes
import fnmatch
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from rows import (
    FIRST_BYTE,
    FRESH,
    IMAGES,
    MEMORY,
    MEMORY_AFTER,
    MEMORY_ROWS,
    MIB,
    NEEDS,
    ON_DISK,
    OURS,
    ROWS,
    SERVERS,
    TABLE_MEMORY,
    TARGETS,
)

ONE_CPU = ("taskset", "-c", str(min(os.sched_getaffinity(0))))
FILL_S = 60  # filling a disk of the memory layer may take so long
START_S = 10  # a server that does not listen by then has failed
STOP_S = 10  # one that has not ended so long after SIGTERM is killed
SETTLE_S = 0.3  # rest before memory is read
EXTRAS = {MEMORY: "raw", TABLE_MEMORY: "qcow-tables", FIRST_BYTE: "raw"}  # and the kind of image they need


class Failed(Exception):
    """A server or a client did not do what it should; the text says what."""


class Bench:
    def __init__(self, options, work, disk_work):
        self.options = options
        self.work = work
        self.disk_work = disk_work  # for images that have to be on a disk
        self.build = options.build.resolve()
        self.nbdload = self.build / "tests/bench/nbdload"
        self.firstbyte = self.build / "tests/bench/firstbyte"
        self.images = {}
        self.notes = []
        self.servers = []
        self.results = {}  # row -> server -> one result (or None) per round
        self.memory = {}  # row -> server -> KiB by kind of memory
        self.first_byte = {}  # server -> microseconds, or None, per run

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    # Servers and clients

    def expand(self, text, server, kind):
        folder = self.work / server.name
        return string.Template(text).substitute(
            img=self.images[kind],
            size=self.options.size,
            sock=folder / "sock",
            dir=folder,
            conf=folder / "conf",
            build=self.build,
            work=self.work,
            flat=self.images.get("qcow", ""),
        )

    def prepare(self, server, kind):
        """Write what the server needs into a fresh folder, and return its command."""
        folder = self.work / server.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        setup = server.setups[kind]
        if setup.conf:
            (folder / "conf").write_text(self.expand(setup.conf, server, kind))
        return [self.expand(word, server, kind) for word in setup.argv]

    def sock(self, server):
        return self.work / server.name / "sock"

    def client(self, server, *words, one_cpu=False):
        return self.run_json(
            server,
            *(ONE_CPU if one_cpu else ()),
            self.nbdload,
            *("--connect", self.sock(server), "--export", server.export),
            *("--seed", self.options.seed),
            *words,
        )

    def run_json(self, server, *argv):
        """Run one of our programs and return the JSON it prints."""
        run = subprocess.run(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self.options.seconds + 120,
            preexec_fn=die_with_parent,
            check=False,
        )
        if run.returncode != 0:
            text = run.stderr.strip() or run.stdout.strip() or f"exit status {run.returncode}"
            raise Failed(f"{server.name}: {text}{self.tail(server)}")
        return json.loads(run.stdout)

    def tail(self, server):
        """The last lines a server logged, for an error message."""
        log = self.work / server.name / "log"
        lines = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
        return "".join(f"\n    {line}" for line in lines)

    # Cells

    def measure(self, server, row):
        if row.kind in FRESH:
            IMAGES[row.kind](self.images[row.kind], self.options.size_bytes)
        with Running(self, server, row.kind, row.one_cpu) as pid:
            if server.fill:
                self.client(
                    server,
                    *("--pattern", "seqwrite", "--bs", "1M", "--depth", 4),
                    *("--count", self.options.size_bytes // MIB, "--warmup-ms", 0),
                    *("--seconds", FILL_S),
                )
            return self.client(
                server,
                *("--pattern", row.pattern, "--bs", row.bs, "--depth", row.depth),
                *("--conns", row.conns, "--flush-every", row.flush_every),
                *("--seconds", self.options.seconds, "--server-pid", pid),
                one_cpu=row.one_cpu,
            )

    def measure_memory(self, server, kind):
        """Memory after the start, and after one client has come and gone."""
        with Running(self, server, kind) as pid:
            time.sleep(SETTLE_S)
            self.memory.setdefault(MEMORY, {})[server.name] = memory_kib(pid)
            if server.one_client:
                return
            self.client(server, "--depth", 16, "--seconds", 0.3)
            time.sleep(SETTLE_S)
            self.memory.setdefault(MEMORY_AFTER, {})[server.name] = memory_kib(pid)

    def measure_table_memory(self, server):
        """64 GiB of clusters of 64 KiB have 8 MiB of tables; random reads soon need all of them."""
        with Running(self, server, "qcow-tables") as pid:
            self.client(server, "--depth", 16, "--seconds", max(2, self.options.seconds))
            time.sleep(SETTLE_S)
            self.memory.setdefault(TABLE_MEMORY, {})[server.name] = memory_kib(pid)

    def measure_first_byte(self, server, kind):
        argv = [self.firstbyte, self.sock(server), server.export, *self.prepare(server, kind)]
        return self.run_json(server, *argv)["first_byte_us"]

    def attempt(self, function, *args):
        """Call, turning a failure into a note."""
        try:
            return function(*args)
        except (Failed, subprocess.TimeoutExpired, OSError) as error:
            self.note(str(error))
            return None

    # The whole run

    def find_servers(self):
        for server in SERVERS:
            if self.options.servers and server.name not in self.options.servers:
                continue
            program = next(iter(server.setups.values())).argv[0]
            program = program.replace("$build", str(self.build))
            if shutil.which(program):
                self.servers.append(server)
            else:
                self.note(f"{server.name}: {program} is not there, left out")

    def wanted(self, name):
        return fnmatch.fnmatch(name, f"*{self.options.only}*")

    def run(self):
        self.find_servers()
        rows = [row for row in ROWS if self.wanted(row.name)]
        extras = [name for name in EXTRAS if self.wanted(name)]
        if not rows and not extras:
            sys.exit(f"bench: no row matches \"{self.options.only}\"; see --list")
        kinds = {row.kind for row in rows} | {EXTRAS[name] for name in extras}
        kinds |= {NEEDS[kind] for kind in kinds if kind in NEEDS}
        for kind, make in IMAGES.items():
            if kind in kinds:
                self.images[kind] = (self.disk_work if kind in ON_DISK else self.work) / f"image.{kind}"
                make(self.images[kind], self.options.size_bytes)
        if kinds & set(ON_DISK):
            self.note(f"the disk rows' images are on {file_system(self.disk_work)}, {self.disk_work.parent}")
        for number in range(self.options.rounds):
            for row in rows:
                self.run_row(row, number)
        if MEMORY in extras:
            for server in self.servers:
                if "raw" in server.setups:
                    self.attempt(self.measure_memory, server, "raw")
        if TABLE_MEMORY in extras:
            for server in self.servers:
                if "qcow-tables" in server.setups:
                    self.attempt(self.measure_table_memory, server)
        if FIRST_BYTE in extras:
            for number in range(self.options.starts):
                for server in self.servers:
                    if "raw" not in server.setups:
                        continue
                    if None in self.first_byte.get(server.name, []):
                        continue  # failed, which takes long
                    progress(f"first byte {number + 1}/{self.options.starts}: {server.name}")
                    taken = self.attempt(self.measure_first_byte, server, "raw")
                    self.first_byte.setdefault(server.name, []).append(taken)
        progress("")

    def run_row(self, row, number):
        # Every round begins with another server, so that none always comes after the same one.
        shift = number % len(self.servers) if self.servers else 0
        for server in self.servers[shift:] + self.servers[:shift]:
            if row.kind not in server.setups or (server.one_client and row.conns > 1):
                continue
            progress(f"round {number + 1}/{self.options.rounds}: {row.name}: {server.name}")
            result = self.attempt(self.measure, server, row)
            self.results.setdefault(row.name, {}).setdefault(server.name, []).append(result)

    # Figures

    def values(self, row, server, metric):
        """One value per round, None where it failed."""
        if row == FIRST_BYTE:
            return self.first_byte.get(server, [])
        if row in MEMORY_ROWS:
            found = self.memory.get(row, {}).get(server)
            return [found["pss"]] if found else []
        return [round and round[metric] for round in self.results.get(row, {}).get(server, [])]

    def middle(self, row, server, metric):
        return middle(self.values(row, server, metric))

    def ratio(self, row, peer, metric):
        """blkstackd over the peer: the median of the ratios within each round."""
        pairs = zip(self.values(row, OURS, metric), self.values(row, peer, metric))
        return middle([ours / theirs for ours, theirs in pairs if ours and theirs])

    def judge(self):
        measured = {*self.results, *self.memory, *([FIRST_BYTE] if self.first_byte else [])}
        verdicts = []
        for target in TARGETS:
            if target.row not in measured:
                continue
            if target.peer:
                figure = self.ratio(target.row, target.peer, target.metric)
            else:
                figure = self.middle(target.row, OURS, target.metric)
            met = figure is not None and target.holds(figure, target.limit)
            verdicts.append((target, figure, met))
        return verdicts


class Running:
    """A server, for the length of a with block; its value is the process id."""

    def __init__(self, bench, server, kind, one_cpu=False):
        self.bench, self.server = bench, server
        self.argv = [*(ONE_CPU if one_cpu else ()), *bench.prepare(server, kind)]

    def __enter__(self):
        with open(self.bench.work / self.server.name / "log", "wb") as log:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        try:
            self.await_socket()
        except BaseException:
            self.stop()
            raise
        return self.process.pid

    def await_socket(self):
        deadline = time.monotonic() + START_S
        while not self.bench.sock(self.server).exists():
            if self.process.poll() is not None:
                text = f"ended at once, status {self.process.returncode}"
            elif time.monotonic() > deadline:
                text = f"no socket after {START_S} s"
            else:
                time.sleep(0.002)
                continue
            raise Failed(f"{self.server.name}: {text}{self.bench.tail(self.server)}")

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.bench.note(f"{self.server.name}: did not end within {STOP_S} s of SIGTERM, killed")
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def die_with_parent():
    """In a child: be killed when the bench ends in a way that it cannot handle."""
    pr_set_pdeathsig = 1
    LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)


LIBC = ctypes.CDLL(None)


def file_system(folder):
    words = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", folder]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or "?"


def memory_kib(pid):
    """Private (anonymous) memory, and the proportional share of everything mapped."""
    fields = {}
    for name in ("status", "smaps_rollup"):
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            key, _, value = line.partition(":")
            if value.strip().endswith(" kB"):
                fields[key] = int(value.split()[0])
    return {"private": fields["RssAnon"], "pss": fields["Pss"], "rss": fields["VmRSS"]}


def middle(values):
    values = [value for value in values if value is not None]
    return median(values) if values else None


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
