"""Whose files are trusted: the user's own and root's, in places where nobody else can put or swap anything."""

import grp
import os
import pwd
import stat
import types

import pytest

from mfac_hf.ops import private_files
from mfac_hf.ops.private_files import UntrustedPathError, open_lock, private_directory, put_in_place, read_private

STRANGER = 12345


@pytest.fixture
def place(tmp_path):
    """A directory that only this user can write, below which the tests build."""
    return tmp_path.resolve()


@pytest.fixture
def stranger(monkeypatch):
    """Make paths somebody else's: a function that takes them, for which one need not be root."""
    lstat, fstat, theirs = os.lstat, os.fstat, set()

    def owned(status):
        if (status.st_dev, status.st_ino) not in theirs:
            return status
        return types.SimpleNamespace(st_mode=status.st_mode, st_gid=status.st_gid, st_uid=STRANGER)

    def give(path):
        status = lstat(path)
        theirs.add((status.st_dev, status.st_ino))

    fake = types.SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if not name.startswith("__")})
    fake.lstat, fake.fstat = lambda path: owned(lstat(path)), lambda descriptor: owned(fstat(descriptor))
    monkeypatch.setattr(private_files, "os", fake)
    return give


def test_a_directory_of_ones_own_is_made_for_nobody_else_to_write(place):
    mask = os.umask(0)
    try:
        made = private_directory(place / "a" / "b", create=True)
    finally:
        os.umask(mask)
    assert made == place / "a" / "b"
    assert stat.S_IMODE((place / "a").stat().st_mode) == stat.S_IMODE(made.stat().st_mode) == 0o755
    assert private_directory(made) == made


def test_what_is_missing_is_not_made_unless_asked_for(place):
    with pytest.raises(FileNotFoundError):
        private_directory(place / "a" / "b")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o1777, 0o775])
def test_a_directory_that_others_can_write_is_refused(place, mode):
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(mode)
    if os.geteuid() and mode == 0o775 and private_files._is_private_group(cache.stat().st_gid):
        pytest.skip("this user's group has no other member")
    with pytest.raises(
        UntrustedPathError, match=rf"others can write {cache} \(mode {mode:o}\).*chmod go-w.*MFAC_CACHE"
    ):
        private_directory(cache)


def test_a_parent_that_others_can_write_is_refused_before_anything_is_made(place):
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    with pytest.raises(UntrustedPathError, match="others can write .*/open"):
        private_directory(place / "open" / "cache" / "build", create=True)
    assert list((place / "open").iterdir()) == []


def test_below_a_sticky_parent_ones_own_directory_is_right_and_anothers_refused(place, stranger):
    shared = place / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    made = private_directory(shared / "mine", create=True)
    (made / "build").mkdir()
    assert private_directory(made / "build") == made / "build"
    stranger(made)
    for path in (made, made / "build", made / "later"):
        with pytest.raises(UntrustedPathError, match=f"{made} belongs to user {STRANGER}, not to you .*MFAC_CACHE"):
            private_directory(path, create=True)
    assert not (made / "later").exists()


def test_links_are_followed_and_judged(place, stranger):
    real, shared = place / "real", place / "tmp"
    (real / "build").mkdir(parents=True)
    shared.mkdir()
    shared.chmod(0o1777)
    (place / "absolute").symlink_to(real)
    (place / "relative").symlink_to("absolute/../real")
    (shared / "link").symlink_to(place / "relative")
    for link in (place / "absolute", place / "relative", shared / "link", place / "tmp" / ".." / "real"):
        assert private_directory(link / "build") == real / "build"
    stranger(shared / "link")
    with pytest.raises(UntrustedPathError, match=f"{shared / 'link'} belongs to user {STRANGER}"):
        private_directory(shared / "link" / "build")
    real.chmod(0o777)
    with pytest.raises(UntrustedPathError, match=f"others can write {real}"):
        private_directory(place / "relative" / "build")
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    with pytest.raises(OSError, match="[Tt]oo many"):
        private_directory(place / "a")


def test_a_file_is_no_directory(place):
    (place / "file").touch()
    for path in (place / "file", place / "file" / "below"):
        with pytest.raises(NotADirectoryError):
            private_directory(path, create=True)


@pytest.mark.parametrize(
    ("uid", "name", "members", "private"),
    [
        (1000, "ada", [], True),
        (1000, "ada", ["ada"], True),
        (1000, "ada", ["ada", "bob"], False),
        (1000, "staff", [], False),
        (0, "ada", [], False),
    ],
)
def test_whose_group_is_private(monkeypatch, uid, name, members, private):
    """With a umask of 002 everything is writable by a group that is the user's own; root's does not count as such."""
    user = types.SimpleNamespace(pw_uid=uid, pw_gid=77, pw_name="ada")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: types.SimpleNamespace(gr_name=name, gr_mem=members))
    assert private_files._is_private_group(77) == private
    assert not private_files._is_private_group(78)


def test_an_access_control_list_is_not_a_private_group(place, monkeypatch):
    if not hasattr(os, "listxattr"):
        pytest.skip("this system shows no access control lists")
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(0o775)
    monkeypatch.setattr(private_files, "_is_private_group", lambda gid: True)
    assert private_directory(cache) == cache
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"])
    with pytest.raises(UntrustedPathError, match="others can write"):
        private_directory(cache)


def test_files_are_read_only_where_nobody_else_wrote_them(place, stranger):
    file = place / "file"
    assert read_private(file) is None
    file.write_bytes(b"mine")
    file.chmod(0o644)
    assert read_private(file) == b"mine"
    (place / "link").symlink_to(file)
    os.mkfifo(place / "pipe")
    (place / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        assert read_private(place / name) is None, name
    file.chmod(0o666)
    assert read_private(file) is None
    file.chmod(0o644)
    stranger(file)
    assert read_private(file) is None


def test_a_lock_keeps_its_content_and_follows_no_link(place):
    precious = place / "precious"
    precious.write_text("years of work")
    os.link(precious, place / "hard")
    os.close(open_lock(place / "hard"))
    assert precious.read_text() == "years of work"
    for name, target in (("soft", precious), ("dangling", place / "nowhere")):
        (place / name).symlink_to(target)
        with pytest.raises(OSError, match="symbolic links|links"):
            open_lock(place / name)
    os.mkfifo(place / "pipe")
    with pytest.raises(OSError, match="no ordinary file"):
        open_lock(place / "pipe")
    assert precious.read_text() == "years of work" and not (place / "nowhere").exists()


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_name_is_taken_over_not_written_through(place, kind):
    precious, made, target = place / "precious", place / "made", place / "target"
    precious.write_text("years of work")
    (os.symlink if kind == "soft" else os.link)(precious, target)
    made.write_text("new")
    made.chmod(0o777)
    put_in_place(made, target)
    assert precious.read_text() == "years of work"
    assert target.read_text() == "new" and not target.is_symlink() and not made.exists()
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
