"""An FTP server on the loopback address: storage that nobody mounts, spoken to over a network."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_nodes import free_port

PROGRAM = shutil.which("vsftpd") or shutil.which("vsftpd", path="/usr/sbin")
_START_S = 10.0


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve ``folder``, to anybody on this machine, and yield its URL."""
    assert PROGRAM is not None
    port = free_port()
    settings = {
        "listen": "YES",
        "listen_address": "127.0.0.1",
        "listen_port": port,
        "background": "NO",
        "run_as_launching_user": "YES",  # which needs no rights of its own, and shuts nobody in
        "ftp_username": pwd.getpwuid(os.getuid()).pw_name,
        "seccomp_sandbox": "NO",
        "anonymous_enable": "YES",
        "no_anon_password": "YES",
        "anon_root": folder,
        "anon_umask": "022",
        "anon_world_readable_only": "NO",
        "write_enable": "YES",
        "anon_upload_enable": "YES",
        "anon_mkdir_write_enable": "YES",
        "anon_other_write_enable": "YES",
        "xferlog_enable": "NO",
    }
    file = folder.with_name(f"{folder.name}.conf")
    file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    folder.mkdir(exist_ok=True)
    server = subprocess.Popen([PROGRAM, str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + _START_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vsftpd did not start: {server.communicate()[0]!r}")
            time.sleep(0.05)
        yield f"ftp://127.0.0.1:{port}{folder}"
    finally:
        server.kill()
        server.communicate()
