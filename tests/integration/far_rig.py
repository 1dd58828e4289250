"""Far servers for the tests of the nbd layer: from far_rig import Far, stack, start_fails ..."""
import os
import signal
import socket
import subprocess
import time

from rig import BUILD, START_TIMEOUT_S, check, config

FAR = os.path.abspath('far')  # the unix socket they listen on
URI = f'nbd+unix:///disk?socket={FAR}'


class Far:
    """A server in the foreground: `with Far('nbdkit', ...)`. It listens on FAR, or on a TCP address."""

    def __init__(self, *words, address=FAR):
        if address == FAR and os.path.exists(FAR):
            os.unlink(FAR)
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.listens(address):
            check(self.process.poll() is None, f'{words[0]} ended')
            check(time.monotonic() < deadline, f'{words[0]} does not listen')
            time.sleep(0.01)

    @staticmethod
    def listens(address):
        family = socket.AF_UNIX if address == FAR else socket.AF_INET
        with socket.socket(family) as probe:
            return probe.connect_ex(address) == 0

    def signal(self, number):
        self.process.send_signal(number)

    def freeze(self):
        """It stands still when this returns."""
        self.signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()


def nbdkit(*words):
    return Far('nbdkit', '-f', '-U', FAR, *words)


def stack(uri=URI, options=''):
    return f'stack = ( {{ layer = "nbd"; uri = "{uri}"; {options} }} );'


def start_fails(expected, uri=URI, options=''):
    """blkstackd refuses to start with exactly this error of the layer, and in bounded time."""
    path = config({'a': stack(uri, options)})
    done = subprocess.run([f'{BUILD}/blkstackd', '--config', path], capture_output=True, text=True,
                          timeout=START_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL)
    lines = [line for line in done.stderr.splitlines() if 'export "a": nbd: ' in line]
    check(done.returncode == 1, f'exit status {done.returncode}: {done.stderr}')
    check(len(lines) == 1, done.stderr)
    found = lines[0].split('export "a": nbd: ')[1]
    check(found == expected, f'\n    {found}, expected\n    {expected}')
