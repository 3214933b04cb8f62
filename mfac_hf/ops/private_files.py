"""Directories and files that nobody but this user, or root, can have written.

A library that is loaded runs with all rights of this process, so it has to come from such a place. What counts:

- the directory itself belongs to this user or to root, and nobody else can write it;
- so do the directories above it, up to the root of the file system, and every symbolic link on the way. A directory
  above that others can write is right with the sticky bit, as ``/tmp`` has it: nobody else can rename what is ours;
- a group that can write counts as somebody else, unless it is the user's private group: their first one, of their own
  name, without other members. Where such groups are the custom, the umask is 002, and all new directories are
  writable by the group.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

__all__ = ["UntrustedPathError", "open_lock", "private_directory", "put_in_place", "read_private"]

# As many links as Linux follows in one path.
MAX_LINKS = 40


class UntrustedPathError(RuntimeError):
    """Somebody else can write here; says who, where, and what to do."""


def private_directory(path: Path, *, create: bool = False) -> Path:
    """Check a directory and all above it, from the root downwards.

    Args:
        path: the directory; links on the way are followed and checked, too.
        create: make what is missing, each directory only below one that was found right.

    Returns:
        The same directory without links.

    Raises:
        UntrustedPathError: somebody else can write the directory, or replace it.
        FileNotFoundError: it is missing, and ``create`` is False.
        OSError: it is no directory, or cannot be made or looked at.
    """
    here = Path(path.absolute().anchor)
    waiting = list(reversed(path.absolute().parts[1:]))
    links = 0
    _check_directory(here, os.lstat(here), last=not waiting)
    while waiting:
        part = waiting.pop()
        if part == "..":
            here = here.parent
            continue
        entry = here / part
        if create and not os.path.lexists(entry):
            with suppress(FileExistsError):  # another process was faster: its owner is checked like any other
                entry.mkdir(mode=0o755)
        status = os.lstat(entry)
        if stat.S_ISLNK(status.st_mode):
            _check_owner(entry, status.st_uid, last=False)
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = entry.readlink()
            if target.is_absolute():
                here = Path(target.anchor)
            waiting += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            continue
        _check_directory(entry, status, last=not waiting)
        here = entry
    return here


def read_private(path: Path) -> bytes | None:
    """Read a file of a private directory; None if it is missing, a link, no file, or somebody else's to write."""
    try:
        # O_NONBLOCK: a pipe of this name would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            return None
        if _others_can_write(path, status):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """Open a file to lock, made where it is missing; its content stays, and a link is not followed.

    Raises:
        OSError: it is a link, no file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no ordinary file", str(path))
    return descriptor


def put_in_place(made: Path, target: Path) -> None:
    """Give a finished file its name, in the same file system; it is on the disk, and no one else's to write, before.

    What had the name before (a link included) is replaced, never written through.
    """
    descriptor = os.open(made, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~0o022)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(made, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_directory(path: Path, status: os.stat_result, *, last: bool) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    _check_owner(path, status.st_uid, last=last)
    if _others_can_write(path, status) and (last or not status.st_mode & stat.S_ISVTX):
        raise UntrustedPathError(
            f"others can write {path} (mode {stat.S_IMODE(status.st_mode):o}), so they could have put code there that "
            f"would run here; take that right away (chmod go-w), or name another directory in MFAC_CACHE"
        )


def _check_owner(path: Path, owner: int, *, last: bool) -> None:
    trusted = {0, os.geteuid()}
    if not last:
        # In a container without a root user of its own, the directories of the system belong to an unknown user.
        trusted.add(os.lstat(path.anchor).st_uid)
    if owner not in trusted:
        raise UntrustedPathError(
            f"{path} belongs to user {owner}, not to you (user {os.geteuid()}) or to root, so that user could have "
            "put code there that would run here; name a directory of your own in MFAC_CACHE"
        )


def _others_can_write(path: Path, status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    # With an access control list, the group's bits stand for all whom the list names.
    with suppress(OSError, AttributeError):  # no such lists in this file system, or this system
        if "system.posix_acl_access" in os.listxattr(path):
            return True
    return not _is_private_group(status.st_gid)


def _is_private_group(group: int) -> bool:
    import grp  # here: Windows has none of the two
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    # Not root's: on some systems the administrators are in that group.
    own = user.pw_uid != 0 and user.pw_gid == group and found.gr_name == user.pw_name
    return own and set(found.gr_mem) <= {user.pw_name}
