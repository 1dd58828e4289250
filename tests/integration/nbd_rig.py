"""A daemon for the NBD tests, on a unix socket and on TCP: from nbd_rig import serve, run, URIS ..."""
import hashlib
import os
import random
import re
import subprocess
import time

import nbd

from rig import Daemon, check

RUN_TIMEOUT_S = 240  # sanitizers on a loaded machine
ENGINES = ('uring', 'threads')
MIB = 1 << 20


class Server(Daemon):
    """exports: {name: text of the export's group}. Listens on .socket and on 127.0.0.1:.port."""

    def __init__(self, exports, wrapper=(), **settings):
        self.socket = os.path.abspath('nbd')
        lines = [f'listen = ( "unix:{self.socket}", "tcp:127.0.0.1:0" );']
        for key, value in settings.items():
            value = f'"{value}"' if isinstance(value, str) else value
            lines.append(f'{key.replace("_", "-")} = {value};')
        groups = [f'  {{ name = "{name}"; {text} }}' for name, text in exports.items()]
        lines.append('exports = (\n' + ',\n'.join(groups) + '\n);\n')
        with open('blkstack.conf', 'w', encoding='utf-8') as file:
            file.write('\n'.join(lines))
        super().__init__('blkstack.conf', wrapper=wrapper)
        self.port = int(re.search(r'served on tcp:127\.0\.0\.1:(\d+)', self.log()).group(1))

    def uris(self, export):
        return (f'nbd+unix:///{export}?socket={self.socket}',
                f'nbd://127.0.0.1:{self.port}/{export}')

    def client(self, export, uri_number=0):
        handle = nbd.NBD()
        handle.connect_uri(self.uris(export)[uri_number])
        return handle

    def open_fds(self):
        return len(os.listdir(f'/proc/{self.process.pid}/fd'))

    def expect_fds(self, count):
        """Descriptors are closed a moment after their clients left."""
        deadline = time.monotonic() + 300
        while self.open_fds() != count:
            check(time.monotonic() < deadline, f'{self.open_fds()} descriptors, {count} before')
            time.sleep(0.01)

    def expect_clean_end(self):
        status = self.stop()
        check(status == 0, f'exit status {status}, log:\n{self.log()}')


def image(path, size):
    """A sparse file with data here and there, the same every time."""
    generator = random.Random(size)
    with open(path, 'wb') as file:
        file.truncate(size)
        for _ in range(20):
            length = generator.randrange(1, size // 40)
            file.seek(generator.randrange(size - length))
            file.write(generator.randbytes(length))


def md5(path):
    with open(path, 'rb') as file:
        return hashlib.md5(file.read()).hexdigest()


def run(*words, status=0):
    """Standard output of a command that must end with that exit status."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=RUN_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL)
    check(done.returncode == status,
          f'{" ".join(words)}: exit status {done.returncode}, expected {status}:\n{done.stdout}')
    return done.stdout
