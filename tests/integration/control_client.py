"""What the control tests share: a daemon to talk to, blkstackctl, a raw Varlink client, checks."""
import atexit
import json
import os
import socket
import subprocess
import sys
import time

import rig
from rig import BUILD

SCRATCH = os.environ['SCRATCH']
CTL = f'{BUILD}/blkstackctl'
DEADLINE_S = 300  # reached only when a test fails

OK, FAILED, USAGE, NO_DAEMON, NOT_PERMITTED, NO_SUCH_EXPORT, BUSY = range(7)


def check(condition, *what):
    """An assertion that tells where it failed and with what."""
    if not condition:
        caller = sys._getframe(1)
        sys.exit(f'{os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno}: '
                 + ' '.join(map(str, what)))


def equal(got, expected, what=''):
    if got != expected:
        caller = sys._getframe(1)
        sys.exit(f'{os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno}: {what}\n'
                 f'  expected {expected!r}\n  got      {got!r}')


def wait_until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        check(time.monotonic() < deadline, f'{what}: not within {DEADLINE_S} s')
        time.sleep(0.01)


class Daemon(rig.Daemon):
    """A blkstackd with a config of its own in SCRATCH. exports and settings are config text."""

    def __init__(self, exports, settings='', name='d', start=True):
        self.control = f'{SCRATCH}/{name}.control'
        self.nbd = f'{SCRATCH}/{name}.nbd'
        self.config = f'{SCRATCH}/{name}.conf'
        with open(self.config, 'w', encoding='utf-8') as file:
            file.write(f'control = "{self.control}";\nlisten = "unix:{self.nbd}";\n{settings}\n'
                       f'exports = ( {exports} );\n')
        if start:
            self.start()

    def start(self, **kwargs):
        super().__init__(self.config, **kwargs)
        atexit.register(self.process.kill)

    def ctl(self, *words, **kwargs):
        return ctl('--socket', self.control, *words, **kwargs)

    def answer(self, *words):
        """What blkstackctl --json prints, parsed."""
        done = self.ctl('--json', *words)
        equal(done.returncode, OK, f'{words}: {done.stderr}')
        return json.loads(done.stdout)

    def uri(self, export):
        return f'nbd+unix:///{export}?socket={self.nbd}'

    def stop(self):
        equal(super().stop(), 0, 'exit status of the daemon:\n' + self.log())


def ctl(*words, wrapper=(), stdout=subprocess.PIPE, **kwargs):
    return subprocess.run([*wrapper, CTL, *words], stdout=stdout, stderr=subprocess.PIPE, text=True,
                          timeout=DEADLINE_S, check=False, stdin=subprocess.DEVNULL, **kwargs)


def fails(done, status, *parts):
    """The command failed with that status, printed nothing, and said one line that has all the parts."""
    equal(done.returncode, status, done.stderr)
    equal(done.stdout, '', 'standard output of a failure')
    equal(done.stderr.count('\n'), 1, done.stderr)
    check(done.stderr.startswith('blkstackctl: '), done.stderr)
    for part in parts:
        check(part in done.stderr, f'"{part}" is not in: {done.stderr}')


class Varlink:
    """A raw client."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)  # without a time-out: it waits while the backlog is full
        self.socket.settimeout(DEADLINE_S)
        self.received = b''

    def send(self, method, parameters=None, **flags):
        call = {'method': method, **flags}
        if parameters is not None:
            call['parameters'] = parameters
        self.socket.sendall(json.dumps(call).encode() + b'\0')

    def receive(self):
        """The next message, or None at the end."""
        while b'\0' not in self.received:
            try:
                got = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not got:
                return None
            self.received += got
        message, self.received = self.received.split(b'\0', 1)
        return json.loads(message)

    def call(self, method, parameters=None):
        self.send(method, parameters)
        return self.receive()

    def close(self):
        self.socket.close()
