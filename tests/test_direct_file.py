"""Files past the page cache: the bytes that were given, in whatever pieces; what the disk says is heard."""

import errno
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from ep_engine.direct_file import ROOM_BYTES, DirectFile

SIZES = {
    "nothing": [],
    "less than a room": [0, 5, 4096],
    "a room": [ROOM_BYTES],
    "rooms and a rest": [7, ROOM_BYTES, 1, 2 * ROOM_BYTES + 4097, 0, 3],
}


@pytest.mark.parametrize("folder", ["disk", "memory"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_file_has_the_bytes_that_were_given(sizes: list[int], folder: str, tmp_path: Path) -> None:
    """On /dev/shm as well, which depending on the kernel has no direct writes."""
    path = tmp_path / "file" if folder == "disk" else Path("/dev/shm") / f"{tmp_path.name}-{tmp_path.parent.name}"
    draw = np.random.default_rng(0)
    path.write_bytes(b"what was there before, and longer" * 8)
    try:
        whole = b""
        with DirectFile(path) as file:
            for size in sizes:
                piece = draw.integers(0, 256, size, np.uint8)
                assert file.write(piece.tobytes() if size % 2 else piece) == size
                whole += piece.tobytes()
                piece[:] = 0  # it may change once it was given
                assert file.tell() == len(whole)
        assert file.closed
        assert path.read_bytes() == whole
    finally:
        path.unlink()


def test_torch_reads_what_it_saved(tmp_path: Path) -> None:
    tensor = torch.randn(3, ROOM_BYTES // 8)
    with DirectFile(tmp_path / "file") as file:
        torch.save(tensor, file)  # type: ignore[arg-type]
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True), tensor)


def _write_rooms(path: Path) -> None:
    with DirectFile(path) as file:
        for _ in range(3):
            file.write(bytes(ROOM_BYTES))


@pytest.mark.parametrize("room", [ROOM_BYTES // 2, ROOM_BYTES + 4096], ids=["at once", "on the way"])
def test_a_full_disk_is_told(room: int, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            _write_rooms(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.errno == errno.EFBIG
