"""Two hosts on one machine: network namespaces on a bridge, whose links can be cut.

Owns namespaces, addresses, and the processes begun in them, which are ended by their ids. Each host
sees its own processes only, and has a name that resolves to its address, as hosts have. Names and
the subnet are this process's own. Knows nothing of Ray.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

NUMBERS = (1, 2)
TOOLS = ("ip", "unshare", "mount", "hostname", "setpriv")
# As a host boots: its name, what it knows of names, and the code where the image has it.
BOOT = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /opt
mkdir /opt/rayjobs
mount --bind "$3" /opt/rayjobs
shift 3
exec "$@"
"""


def why_not() -> str | None:
    """Why there can be no such hosts here."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if sys.base_prefix.startswith("/opt/"):
        return "this Python is below /opt, which the hosts have for themselves"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not on PATH: {', '.join(missing)} (iproute2, util-linux, hostname)"
    probe = f"rj{os.getpid():x}p"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "del", probe)
    return None


class Network:
    """The hosts 1 and 2, and a third address, which is this machine's own."""

    def __init__(self, folder: Path, code: Path) -> None:
        self.folder, self.code = folder, code
        self._bridge = f"rj{os.getpid():x}"
        self._subnet = _free_subnet()
        self.address = f"{self._subnet}.254"
        self._processes: dict[int, list[subprocess.Popen[bytes]]] = {n: [] for n in NUMBERS}

    def up(self) -> None:
        _sweep()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for number in NUMBERS:
            self._make_host(number)

    def _make_host(self, number: int) -> None:
        space, link = self._space(number), self._link(number)
        _ip("netns", "add", space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{self.host(number)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", space, "link", "set", device, "up")
        _ip("-n", space, "route", "add", "default", "via", self.address)
        lines = ["127.0.0.1 localhost", *(f"{self.host(n)} {name(n)}" for n in NUMBERS)]
        self._hosts_file.write_text("\n".join(lines) + "\n")

    def host(self, number: int) -> str:
        """A host's address."""
        return f"{self._subnet}.{number}"

    def start(self, number: int, command: list[str], environment: dict[str, str]) -> None:
        """Begin a process on a host; all that it starts ends with it."""
        apart = ["unshare", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"]
        inside = ["ip", "netns", "exec", self._space(number), *apart]
        boot = ["sh", "-c", BOOT, "sh", name(number), str(self._hosts_file), str(self.code)]
        with (self.folder / f"{name(number)}.out").open("ab") as log:
            process = subprocess.Popen(
                # It ends with us even when we are killed.
                ["setpriv", "--pdeathsig", "KILL", *inside, *boot, *command],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[number].append(process)

    def is_running(self, number: int) -> bool:
        """Whether what was begun last on a host goes on."""
        return bool(self._processes[number]) and self._processes[number][-1].poll() is None

    def kill(self, number: int, program: str) -> None:
        """Kill the processes of a program on a host."""
        pids = _ip("netns", "pids", self._space(number)).split()
        found = [p for p in pids if Path(f"/proc/{p}/comm").read_text().strip() == program]
        assert found, f"no {program} runs on {name(number)}"
        for pid in found:
            os.kill(int(pid), signal.SIGKILL)

    def stop(self, number: int) -> None:
        """End a host's processes at once, as when its power goes."""
        while self._processes[number]:
            process = self._processes[number].pop()
            process.kill()
            process.wait()

    def cut(self, number: int) -> None:
        _ip("link", "set", self._link(number), "down")

    def heal(self, number: int) -> None:
        _ip("link", "set", self._link(number), "up")

    def down(self) -> None:
        for number in NUMBERS:
            self.stop(number)
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", self._space(number))  # and its link
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)

    @property
    def _hosts_file(self) -> Path:
        return self.folder / "hosts"

    def _space(self, number: int) -> str:
        return f"{self._bridge}-{number}"

    def _link(self, number: int) -> str:
        return f"{self._bridge}v{number}"


def name(number: int) -> str:
    return f"host-{number}"


def _sweep() -> None:
    """Remove what processes that were killed have left; names tell whose it is."""
    for space, pid in re.findall(r"^(rj([0-9a-f]+)-\d)\b", _ip("netns", "list"), re.MULTILINE):
        if not Path(f"/proc/{int(pid, 16)}").exists():
            _ip("netns", "del", space)
    for link, pid in re.findall(r"^\d+: (rj([0-9a-f]+)):", _ip("link"), re.MULTILINE):
        if not Path(f"/proc/{int(pid, 16)}").exists():
            _ip("link", "del", link)


def _free_subnet() -> str:
    """The first three bytes of addresses that nothing here has."""
    taken = _ip("-4", "addr") + _ip("-4", "route")
    while f" {(found := f'10.{random.randrange(64, 256)}.{random.randrange(256)}')}." in taken:
        pass
    return found


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, check=True, text=True)
    return done.stdout
