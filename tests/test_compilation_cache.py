"""Tests for the cache of compiled programs that the command and all calculators share."""

import os
import stat
from pathlib import Path

import jax
import pytest

from mlip_jax.compilation_cache import EXTERNAL_KERNELS, keep_compiled_programs

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_cache_folder_of_the_user(no_cache):
    """A first energy consists of programs that compile in less than JAX's limit of 1 s."""
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir.startswith(f"{no_cache}/mlip_jax/{jax.__version__}")
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 0.5


def test_choices_of_the_user_are_kept(no_cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # off
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", "/mine")
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "/mine"


def test_folders_that_others_can_write_to_are_not_used(no_cache, monkeypatch, caplog):
    """Detects compiled programs of other users, which JAX would run as code of this user."""
    shared = no_cache / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared))
    jax.config.update("jax_compilation_cache_dir", str(shared))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None and "writable by others" in caplog.text
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "replaced"))
    jax.config.update("jax_compilation_cache_dir", str(shared / "replaced"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None and "can be replaced" in caplog.text


def others_can_replace(path, monkeypatch):
    """Return whether a cache in a folder of the environment is not used."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(path))
    jax.config.update("jax_compilation_cache_dir", str(path))
    keep_compiled_programs()
    return jax.config.jax_compilation_cache_dir is None


def test_folders_above_that_others_can_write_to(no_cache, monkeypatch, caplog):
    """Others could rename shared/own and create another one; so could the owner of a folder above."""
    own = no_cache / "shared/own/cache"
    own.mkdir(parents=True)
    assert not others_can_replace(own, monkeypatch)
    (no_cache / "link").symlink_to("shared/own")
    (no_cache / "shared").chmod(0o1777)  # as /tmp
    assert not others_can_replace(no_cache / "link/a", monkeypatch)
    (no_cache / "shared").chmod(0o777)
    for path in (own / "b/c", no_cache / "link/b"):
        assert others_can_replace(path, monkeypatch)
        assert f"can be replaced by others who can write to {no_cache}/shared" in caplog.text
        caplog.clear()
    if os.geteuid() == 0:
        (no_cache / "shared").chmod(0o755)
        os.chown(no_cache / "shared", 12345, -1)
        assert others_can_replace(own / "d", monkeypatch)
        assert f"{no_cache}/shared belongs to another user" in caplog.text


def test_a_loop_of_links_is_no_cache(no_cache, monkeypatch):
    (no_cache / "loop").symlink_to("loop")
    assert others_can_replace(no_cache / "loop/cache", monkeypatch)


def test_new_folders_are_private(no_cache):
    """With the umask 002 of some systems, the group could have replaced the cache."""
    umask = os.umask(0o002)
    try:
        keep_compiled_programs()
    finally:
        os.umask(umask)
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (folder, folder.parent)} == {0o700}


def test_programs_with_external_kernels_are_not_kept(no_cache, monkeypatch):
    """Detects programs of another process whose kernels do not exist in this one."""
    monkeypatch.setenv(EXTERNAL_KERNELS, "cuequivariance")
    jax.config.update("jax_compilation_cache_dir", "/mine")
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
