"""An ssh server of a test's own, at addresses of the loopback that stand for nodes."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.pool import free_port
from tests.e2e.cli import wait_until

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
needs_ssh = pytest.mark.skipif(
    SSHD is None or shutil.which("pdsh") is None or os.geteuid() != 0,
    reason="needs sshd and pdsh, and to be root",
)
ADDRESSES = ("127.0.0.1", "127.0.0.2")


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serve ssh to this machine with keys of our own; `ssh` from PATH uses them. Yield the port."""
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", folder / key], check=True)
    port = free_port()
    listen = "".join(f"ListenAddress {address}\n" for address in ADDRESSES)
    (folder / "sshd_config").write_text(
        f"Port {port}\n{listen}HostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
    )
    (folder / "config").write_text(
        f"IdentityFile {folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        f"LogLevel ERROR\nUser {getpass.getuser()}\n"
    )
    # ssh looks for ~/.ssh in the password file, not in $HOME.
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    wrapper.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"])
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{wrapper.parent}:{path}"
    try:
        wait_until(lambda: all(_answers(address, port) for address in ADDRESSES))
        yield port
    finally:
        os.environ["PATH"] = path
        server.terminate()
        server.wait()


def _answers(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0
