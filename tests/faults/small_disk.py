"""A file system of a few hundred kilobytes, in a namespace of this process: it ends with the process."""

import ctypes
import os
from pathlib import Path

_NEW_MOUNTS, _NEW_USER, _REMOUNT, _PRIVATE = 0x20000, 0x10000000, 32, 0x4000 | 1 << 18


class NoSmallDisk(Exception):
    """This machine does not let a process mount anything."""


class SmallDisk:
    """Mounted at ``folder``. Not for a process with threads."""

    def __init__(self, folder: Path, size: int):
        folder.mkdir()
        self._folder = str(folder).encode()
        self._libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        self._call("unshare", _NEW_MOUNTS | (_NEW_USER if user else 0))
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        self._call("mount", None, b"/", None, _PRIVATE, None)
        self._call("mount", b"tmpfs", self._folder, b"tmpfs", 0, f"size={size}".encode())

    def grow(self, size: int) -> None:
        self._call("mount", b"tmpfs", self._folder, b"tmpfs", _REMOUNT, f"size={size}".encode())

    def _call(self, name: str, *given: object) -> None:
        if getattr(self._libc, name)(*given):
            raise NoSmallDisk(os.strerror(ctypes.get_errno()))
