"""A daemon for the tests in Python: from rig import Daemon, check, config."""
import os
import signal
import subprocess
import sys
import time

import nbd

BUILD = os.environ['BUILD']
START_TIMEOUT_S = 300  # sanitizers on a loaded machine; never waited for in full when all is well


def check(condition, text):
    """An assertion that python -O does not drop, and that says what it saw."""
    if not condition:
        caller = sys._getframe(1)
        raise SystemExit(f'line {caller.f_lineno}: FAILED: {text}')


def is_asleep(pid):
    """It waits for somebody. nbd-server listens and then draws primes, for a second or ten, before it talks."""
    with open(f'/proc/{pid}/stat', encoding='utf-8') as file:
        return file.read().rsplit(') ', 1)[1][0] == 'S'


def config(exports, folder='.', **settings):
    """Writes a config file: exports is {name: text of the stack's layers and other keys}."""
    path = os.path.join(folder, 'blkstack.conf')
    settings = {'listen': os.path.join(os.path.abspath(folder), 'nbd'), **settings}
    with open(path, 'w', encoding='utf-8') as file:
        for key, value in settings.items():
            value = f'"{value}"' if isinstance(value, str) else value
            file.write(f'{key.replace("_", "-")} = {value};\n')
        items = ',\n'.join(f'  {{ name = "{name}"; {text} }}' for name, text in exports.items())
        file.write(f'exports = (\n{items}\n);\n')
    return path


class Daemon:
    """blkstackd, from ready to gone: `with Daemon(path) as daemon`."""

    def __init__(self, path, *args, wrapper=(), env=None, ready='is ready',
                 program=f'{BUILD}/blkstackd'):
        self.log_path = f'{path}.log'
        with open(self.log_path, 'w', encoding='utf-8') as log:
            self.process = subprocess.Popen(
                [*wrapper, program, '--config', path, *args], stderr=log,
                stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})})
        if ready:
            self.wait_for_log(ready)

    def log(self):
        with open(self.log_path, encoding='utf-8') as log:
            return log.read()

    def wait_for_log(self, text):
        deadline = time.monotonic() + START_TIMEOUT_S
        while text not in self.log():
            if self.process.poll() is not None and text not in self.log():
                raise SystemExit(f'ended with {self.process.returncode}, log:\n{self.log()}')
            if time.monotonic() > deadline:
                raise SystemExit(f'no "{text}" in the log:\n{self.log()}')
            time.sleep(0.01)

    def connect(self, export, socket=None):
        handle = nbd.NBD()
        handle.set_export_name(export)
        handle.connect_unix(socket or os.path.join(os.path.dirname(self.log_path) or '.', 'nbd'))
        return handle

    def kill(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self):
        return self.process.wait(START_TIMEOUT_S)

    def stop(self, number=signal.SIGTERM):
        """The exit status, negative for a signal."""
        self.kill(number)
        return self.wait()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            if kind:
                print(f'log of the daemon:\n{self.log()}')
        return False
