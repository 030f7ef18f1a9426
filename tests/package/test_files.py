"""Atomic writes of files: by threads and processes at once, under SIGKILL, on a full disk."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from interformer_kernels import _files
from interformer_kernels._files import (
    DamagedFileError,
    check_writable,
    read_sealed,
    replacing,
    write_sealed,
    write_text,
)

ROUNDS = 12 * int(os.environ.get("INTERFORMER_FIRE", "1"))  # kills; `INTERFORMER_FIRE=20` is the larger campaign
# The module is loaded by its path, so that its processes do not spend seconds on importing torch.
LOADED = f"""
import importlib.util, sys, os, resource
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {_files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path = Path(sys.argv[1])
"""


def _start(program: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOADED + program, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_module_needs_the_standard_library_alone(tmp_path: Path) -> None:
    assert importlib.util.find_spec("interformer_kernels._files") is not None
    with _start("assert 'torch' not in sys.modules", tmp_path) as process:
        assert process.wait(60) == 0, process.stderr and process.stderr.read()


def test_threads_write_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write(number: int) -> None:
        write_text(path, str(number) * 5000)
        result = path.read_text()
        assert len(set(result)) == 1
        assert len(result) == 5000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [number % 10 for number in range(300)]))
    assert os.listdir(tmp_path) == ["x"]


def test_processes_write_one_file_at_once(tmp_path: Path) -> None:
    program = "for n in range(60): files.write_text(path, sys.argv[0][:0] + str(os.getpid() % 10) * 4000)"
    processes = [_start(program, tmp_path / "x") for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    result = (tmp_path / "x").read_text()
    assert len(result) == 4000
    assert len(set(result)) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_processes_append_whole_lines_to_one_file(tmp_path: Path) -> None:
    program = "for n in range(300): files.append_line(path, {'pid': os.getpid(), 'n': n, 'nan': float('nan')})"
    processes = [_start(program, tmp_path / "x") for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
    result = [json.loads(line) for line in (tmp_path / "x").read_text().splitlines()]
    for process in processes:
        assert [entry for entry in result if entry["pid"] == process.pid] == [
            {"pid": process.pid, "n": n, "nan": None} for n in range(300)
        ]
    assert len(result) == 1200


def test_a_kill_leaves_the_old_file_or_the_new_and_the_next_writer_clears_up(tmp_path: Path) -> None:
    path, rng = tmp_path / "x", random.Random(5)
    program = "print('go', flush=True)\nwhile True:\n    for c in 'ab': files.write_text(path, c * 3_000_000)"
    leftovers = 0
    for _ in range(ROUNDS):
        with _start(program, path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        if path.exists():
            result = path.read_text()
            assert result in ("a" * 3_000_000, "b" * 3_000_000)
        leftovers += len(os.listdir(tmp_path)) - path.exists()
    assert leftovers, "the kills must have cut off a write"
    write_text(path, "whole")
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_living_writer_holds_is_not_cleared_up(tmp_path: Path) -> None:
    path = tmp_path / "x"
    (tmp_path / f"x.{'0' * 16}.interformer.tmp").touch()  # without a lock
    (tmp_path / "x.backup.tmp").touch()  # not a temporary file
    (tmp_path / f"xy.{'0' * 16}.interformer.tmp").touch()  # of another file
    with replacing(path) as slow:
        slow.write(b"slow")
        write_text(path, "quick")
        assert path.read_text() == "quick"
        assert len(os.listdir(tmp_path)) == 4
    assert path.read_text() == "slow"
    assert sorted(os.listdir(tmp_path)) == ["x", "x.backup.tmp", f"xy.{'0' * 16}.interformer.tmp"]


def test_a_failed_write_leaves_nothing_and_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    for content in (None, "old"):
        if content:
            write_text(path, content)
        with pytest.raises(ZeroDivisionError), replacing(path) as file:
            file.write(b"half" * (1 // len(b"")))
        assert os.listdir(path.parent) == (["x"] if content else [])
    assert path.read_text() == "old"


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")
    program = """
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with files.replacing(path) as file:
        for _ in range(100): file.write(b"x" * 5000)
except OSError as error:
    print(error)
"""
    with _start(program, tmp_path / "x") as process:
        out, err = process.communicate(timeout=60)
    assert out == f"[Errno 27] File too large: '{tmp_path / 'x'}'\n", err
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_is_no_regular_file_is_written_to_and_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_text(Path("/dev/full"), "x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(10)
    assert heard == ["through"]
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", "x")
    assert (tmp_path / "null").is_symlink()
    for write in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(IsADirectoryError, match="wanted a file, found a directory"):
            write(tmp_path)


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    (tmp_path / "x").symlink_to(tmp_path / "private")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("x", "dangling"):
        write_text(tmp_path / name, "new")
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "private").read_text() == "secret"
    assert not (tmp_path / "nothing").exists()


def test_the_mode_is_that_of_open_or_of_the_file_before(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        for name, mode in (("new", None), ("private", 0o600), ("common", 0o664)):
            path = tmp_path / name
            if mode is not None:
                path.touch()
                path.chmod(mode)
            write_text(path, "x")
            assert stat.S_IMODE(path.stat().st_mode) == (mode or 0o640), name
    finally:
        os.umask(previous)


def test_names_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(OSError, match="File name too long"):
        write_text(tmp_path / ("x" * 256), "x")


def test_whether_a_file_can_be_written_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "made" / "x")
    assert os.listdir(tmp_path / "made") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory|File exists"):
        check_writable(tmp_path / "file" / "x")


# ---------------------------------------------------------------- JSON with its checksum


def test_sealed_json_comes_back_and_flipped_bits_of_it_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    content = {"auc": 0.75, "name": "é", "many": [1, 2.5, None, True], "inner": {"a": float("nan")}}
    write_sealed(path, content)
    expected = {**content, "inner": {"a": None}}
    assert read_sealed(path) == expected
    whole, detected = path.read_bytes(), 0
    for position in range(len(whole)):
        for bit in range(8) if ROUNDS > 12 else (position % 8,):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            message = None
            try:
                assert read_sealed(path) == expected  # one kind of white space replaced by another
            except DamagedFileError as error:
                message = str(error)
            assert message is None or (message.startswith(f"{path}: damaged: ") and "\n" not in message)
            detected += message is not None
    assert detected > 0.9 * len(whole)
    for text in (
        "",
        "[" * 100_000,
        "[]",
        "3",
        '{"sha256": 3}',
        '{"auc": 0.75}',
        "\ud800".encode("utf-8", "replace").decode(),
    ):
        path.write_text(text)
        with pytest.raises(DamagedFileError):
            read_sealed(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_sealed(path)
