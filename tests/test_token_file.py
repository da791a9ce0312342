"""Token files: round trips, sizes, damage. Seconds; `pytest -s` prints how fast it was."""

import functools
import itertools
import json
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest

import token_file
from token_file import CRC, MAGIC, RECORD, TokenError, TokenReader, TokenWriter, pack, unpack

ABOUT = {"model": "0123abcd", "height": 64, "width": 96, "fps": 29.97, "name": "ünï/<b>"}
MODES = {"uniform": 0, "frequencies": 1, "video": 2}


def raw_bits(codes, num_codes):
    """Bits of integer `codes` (any shape) at a fixed length: size x ceil(log2(num_codes))."""
    return int(np.size(codes)) * (int(num_codes) - 1).bit_length()


def entropy_bits(codes, num_codes):
    """Order-0 empirical entropy of integer `codes` (any shape, in [0, num_codes)), in bits for all of them together."""
    counts = np.bincount(np.ravel(codes), minlength=num_codes)
    if len(counts) > num_codes:
        raise ValueError(f"code {len(counts) - 1} in a vocabulary of {num_codes}")
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def save(path, pieces, vocabulary, about=ABOUT):
    with TokenWriter(path, about, vocabulary) as writer:
        for codes in pieces:
            writer.write(codes)
    return writer


def same(read, pieces):
    return len(read) == len(pieces) and all(
        len(a) == len(b) and all(x.dtype == np.int64 and np.array_equal(x, y) for x, y in zip(a, b))
        for a, b in zip(read, pieces)
    )


def skewed(rng, shape, num_codes):
    """Independent codes, code k as often as 1 / (k + 2)."""
    share = 1 / np.arange(2, num_codes + 2)
    return rng.choice(num_codes, shape, p=share / share.sum())


def moving(rng, frames, height, width, num_codes, noise=0.02):
    """A still background with a texture that moves over it by a place a frame, and a few random codes."""
    codes = np.repeat(rng.integers(0, num_codes, (1, height, width)), frames, 0)
    texture = rng.integers(0, num_codes, (height // 2, width + frames))
    for t in range(frames):
        codes[t, : height // 2] = texture[:, t : t + width]
    return np.where(rng.random(codes.shape) < noise, rng.integers(0, num_codes, codes.shape), codes)


# ---- round trips and sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_codes", [1, 2, 3, 1000, 1024, 16384, 65536, 1 << 20])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "constant", "single", "moving"])
def test_codes_come_back_in_no_more_than_the_plain_bits(num_codes, kind):
    rng = np.random.default_rng(0)
    shape = (1, 1, 1) if kind == "single" else (40, 6, 9)
    if kind in ("uniform", "single"):
        codes = rng.integers(0, num_codes, shape)
    elif kind == "skewed":
        codes = skewed(rng, shape, num_codes)
    elif kind == "constant":
        codes = np.full(shape, num_codes - 1)
    else:
        codes = moving(rng, *shape, num_codes)
    mode, data = pack(codes, num_codes)
    assert np.array_equal(unpack(mode, data, shape, num_codes), codes)
    assert len(data) <= raw_bits(codes, num_codes) / 8 * 1.003 + 24
    if kind == "constant":
        assert len(data) < 128  # the coder learns it
    if kind == "moving" and num_codes > 2:
        assert mode == MODES["video"] and 8 * len(data) < 0.8 * raw_bits(codes, num_codes)


@pytest.mark.parametrize("num_codes", [2, 3, 1000, 16384])
def test_many_independent_codes_take_their_entropy(num_codes):
    rng = np.random.default_rng(1)
    codes = skewed(rng, (400 if num_codes <= 1000 else 1600, 16, 16), num_codes)  # it learns each code's share
    mode, data = pack(codes, num_codes)
    assert mode == MODES["frequencies"]
    assert 0.999 < 8 * len(data) / entropy_bits(codes, num_codes) < 1.02
    assert np.array_equal(unpack(mode, data, codes.shape, num_codes), codes)


@pytest.mark.parametrize("num_codes", [1000, 65536])
def test_incompressible_codes_take_their_plain_bits(num_codes):
    codes = np.random.default_rng(2).integers(0, num_codes, (200, 16, 16))
    mode, data = pack(codes, num_codes)
    assert mode == MODES["uniform"] and 8 * len(data) < 1.003 * codes.size * np.log2(num_codes)
    assert np.array_equal(unpack(mode, data, codes.shape, num_codes), codes)


@pytest.mark.parametrize("height, width", [(1, 16), (17, 1), (3, 7), (16, 16), (5, 31)])
def test_maps_of_any_shape_are_coded_as_video(height, width):
    rng = np.random.default_rng(3)
    codes = np.repeat(rng.integers(0, 500, (4, height, width)), 15, 0)
    mode, data = pack(codes, 500)
    assert mode == MODES["video"] and 8 * len(data) < entropy_bits(codes, 500) / 3
    assert np.array_equal(unpack(mode, data, codes.shape, 500), codes)


def test_a_still_picture_costs_little_after_its_first_frame():
    codes = np.repeat(np.random.default_rng(4).integers(0, 1024, (1, 16, 16)), 300, 0)
    assert len(pack(codes, 1024)[1]) < 256 * 10 / 8 + 300


def test_bits_are_those_of_the_definitions():
    codes = np.array([[0, 0, 1, 2], [0, 0, 1, 2]])
    assert entropy_bits(codes, 3) == pytest.approx(8 * 1.5) and entropy_bits(np.zeros(9, int), 7) == 0
    assert [raw_bits(codes, n) for n in (1, 2, 3, 1024, 1025)] == [0, 8, 16, 80, 88]
    assert entropy_bits(np.arange(1000), 1000) == pytest.approx(1000 * np.log2(1000))
    with pytest.raises(ValueError, match="code 2 in a vocabulary of 2"):
        entropy_bits(codes, 2)


def test_the_coder_gives_these_very_bytes():
    """A file written today is read tomorrow and elsewhere: a change of the format needs a new version."""
    codes = (np.arange(20 * 4 * 5).reshape(20, 4, 5) // 7) ** 2 % 11
    checks = [zlib.crc32(pack(codes % n, n)[1]) for n in (2, 11)]
    checks.append(zlib.crc32(pack(np.repeat(codes, 5, 0), 11)[1]))
    assert checks == [603424801, 3013863679, 3959397471]


# ---- files -------------------------------------------------------------------------------------------------------


def test_pieces_come_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(5)
    vocabulary, shapes = [512, 3, 65536], [(8, 8), (4, 4), (2, 3)]
    frames = [(1, 1, 0), (4, 2, 1), (4, 2, 1), (0, 0, 0), (4, 2, 1), (3, 0, 0), (0, 0, 2)]
    pieces = [
        [rng.integers(0, n, (t, *s)).astype(kind) for n, s, t, kind in zip(vocabulary, shapes, ts, ("u2", "i4", "i8"))]
        for ts in frames
    ]
    path = tmp_path / "new" / "a.tokens"
    writer = save(path, pieces, vocabulary)
    reader = TokenReader(path)
    pieces.pop(3)  # a piece without codes is none
    assert same(list(reader), pieces) and same(list(reader), pieces)
    assert reader.about == ABOUT and reader.frames == [16, 7, 5]
    assert reader.maps == [(n, *s) for n, s in zip(vocabulary, shapes)]
    assert 0 < reader.bits == writer.bits < 8 * os.path.getsize(path) < reader.bits + 8 * (len(json.dumps(ABOUT)) + 150)
    assert os.listdir(path.parent) == ["a.tokens"]


def test_a_file_without_codes(tmp_path):
    save(tmp_path / "a.tokens", [[np.zeros((0, 4, 4), int)]], [16])
    reader = TokenReader(tmp_path / "a.tokens")
    assert list(reader) == [] and reader.frames == [0] and reader.bits == 0 and reader.about == ABOUT


def test_long_videos_are_written_and_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "CHUNK_CODES", 1 << 12)
    monkeypatch.setattr(token_file, "LANE_BITS", 1 << 8)  # only for speed
    rng = np.random.default_rng(6)
    piece = rng.integers(0, 256, (32, 3, 5))

    def peak(count):
        tracemalloc.start()
        save(tmp_path / "a.tokens", ([(piece + i) % 256] for i in range(count)), [256])
        for i, codes in enumerate(TokenReader(tmp_path / "a.tokens")):
            assert np.array_equal(codes[0], (piece + i) % 256)
        assert i == count - 1
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(96) < 1.2 * peak(24)
    monkeypatch.setattr(token_file, "CHUNK_PIECES", 2)
    save(tmp_path / "b.tokens", [[piece]] * 5, [256])
    assert sum(kind == b"C" for kind, _ in token_file.records(tmp_path / "b.tokens")) == 3
    assert same(list(TokenReader(tmp_path / "b.tokens")), [[piece]] * 5)


def test_an_array_may_be_used_again_after_it_was_written(tmp_path):
    buffer = np.zeros((1, 4, 4), np.int64)
    with TokenWriter(tmp_path / "a.tokens", {}, [8]) as writer:
        for i in range(8):
            buffer[:] = i
            writer.write([buffer])
    assert [int(codes[0].max()) for codes in TokenReader(tmp_path / "a.tokens")] == list(range(8))


def test_a_file_is_complete_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.tokens"
    codes = [np.ones((2, 4, 4), int)]

    def fail_in_the_middle():
        with TokenWriter(path, ABOUT, [4]) as writer:
            writer.write(codes)
            raise KeyError("stop")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyError):
        fail_in_the_middle()
    assert os.listdir(tmp_path) == []
    save(path, [codes], [4])
    before = path.read_bytes()
    with pytest.raises(KeyError):
        fail_in_the_middle()
    assert os.listdir(tmp_path) == ["a.tokens"] and path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "record", disk_full)
        with pytest.raises(OSError, match="No space"):
            save(path, [codes], [4])
    assert os.listdir(tmp_path) == ["a.tokens"] and path.read_bytes() == before


@pytest.mark.parametrize(
    "vocabulary, codes, words",
    [
        ([4], [np.zeros((1, 2, 2))], "integer arrays"),
        ([4], [np.zeros((2, 2), int)], "integer arrays"),
        ([4, 4], [np.zeros((1, 2, 2), int)], "2 integer arrays"),
        ([4], [np.full((1, 2, 2), 4)], "codes from 4 to 4 in a vocabulary of 4"),
        ([4], [np.full((1, 2, 2), -1)], "codes from -1 to -1"),
        ([4], [np.zeros((1, 2, 3), int)], "after"),
        ([4], [np.zeros((1, 1 << 11, 1 << 11), np.int8)], "at most"),
        ([0], [], "vocabulary"),
        ([], [], "vocabulary"),
        ([1 << 21], [], "vocabulary"),
    ],
)
def test_mistakes_are_named(tmp_path, vocabulary, codes, words):
    with pytest.raises(ValueError, match=words), TokenWriter(tmp_path / "a.tokens", {}, vocabulary) as writer:
        writer.write([np.zeros((1, 2, 2), int)] * len(vocabulary))
        writer.write(codes)
    assert os.listdir(tmp_path) == []


def test_about_has_a_limit(tmp_path):
    with pytest.raises(ValueError, match="about takes"):
        TokenWriter(tmp_path / "a.tokens", {"text": "x" * (1 << 20)}, [4])


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """(bytes of a file of several chunks in all modes, its pieces)."""
    rng = np.random.default_rng(7)
    video = moving(rng, 12, 8, 8, 64)
    pieces = [[video[i : i + 1], skewed(rng, (2, 3, 3), 9), rng.integers(0, 5, (1, 1, 2))] for i in range(12)]
    path = tmp_path_factory.mktemp("sample") / "a.tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_file, "CHUNK_CODES", 500)
        save(path, pieces, [64, 9, 5])
    assert sum(kind == b"C" for kind, _ in token_file.records(path)) == 3
    return path.read_bytes(), pieces


def check(path, content, pieces):
    """The message of the TokenError, or "" if all codes came back; anything else fails."""
    path.write_bytes(content)
    try:
        read = list(TokenReader(path))
    except TokenError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "\n" not in message
        return message
    assert same(read, pieces), "wrong codes without an error"
    return ""


def test_any_truncation_is_noticed(tmp_path, sample):
    content, pieces = sample
    assert check(tmp_path / "a", content, pieces) == ""
    for length in range(len(content)):
        message = check(tmp_path / "a", content[:length], pieces)
        assert ("truncated" if length else "no token file") in message, length


def test_any_mutation_is_noticed(tmp_path, sample):
    content, pieces = sample
    rng = np.random.default_rng(8)
    for i in range(300):
        mutated = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            mutated[place] ^= rng.integers(1, 256)
        if i % 3 == 1:
            place = int(rng.integers(0, len(content)))
            del mutated[place : place + int(rng.integers(1, 40))]
        if i % 3 == 2:
            place = int(rng.integers(0, len(content)))
            mutated[place:place] = rng.bytes(int(rng.integers(1, 40)))
        assert check(tmp_path / "a", bytes(mutated), pieces), i


def split(content):
    """The records of a file, as [kind, payload]."""
    at, result = len(MAGIC), []
    while at < len(content):
        kind, length = RECORD.unpack_from(content, at)
        result.append([kind, content[at + RECORD.size : at + RECORD.size + length]])
        at += RECORD.size + length + CRC.size
    return result


def join(parts):
    """A file of these records, with right checksums."""
    content, crc = MAGIC, zlib.crc32(MAGIC)
    for kind, payload in parts:
        head = RECORD.pack(kind, len(payload))
        crc = zlib.crc32(payload, zlib.crc32(head, crc))
        content += head + payload + CRC.pack(crc)
    return content


def test_forged_files_are_refused_or_decoded_to_possible_codes(tmp_path, sample):
    """Mutations with right checksums: no other exception, and no codes outside of the vocabulary."""
    content, _ = sample
    assert join(split(content)) == content
    rng = np.random.default_rng(9)
    refused = 0
    for i in range(160):
        parts = split(content)
        which = int(rng.integers(len(parts)))
        payload = bytearray(parts[which][1])
        place = int(rng.integers(len(payload) if i % 2 else min(len(payload), 40)))
        payload[place] = rng.integers(256) if i % 4 < 3 else 255
        parts[which][1] = bytes(payload)
        (tmp_path / "a").write_bytes(join(parts))
        try:
            reader = TokenReader(tmp_path / "a")
            for codes in reader:
                assert all(0 <= c.min(initial=0) <= c.max(initial=0) < n for c, (n, _, _) in zip(codes, reader.maps))
        except TokenError as error:
            refused += "damaged" in str(error)
    assert refused > 100


def forged(header=None, chunk=None):
    """A file whose one chunk may hold anything."""
    header = {"about": {}, "maps": [[16, 4, 4]]} if header is None else header
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return join([[b"H", header], [b"C", chunk or b""], [b"E", bytes(8)]])


ROW = functools.partial(struct.pack, "<III")
CASES = {
    "another file": (b"RIFF1234567890", "no token file"),
    "nothing": (b"", "no token file"),
    "newer": (MAGIC[:7] + b"\x02" + b"whatever", "newer"),
    "more behind": (join([[b"H", b'{"about": {}, "maps": [[4, 0, 0]]}'], [b"E", bytes(8)]]) + b"x", "follows"),
    "no header": (join([[b"E", b""]]), "checksum"),
    "two headers": (join([[b"H", b'{"about": {}, "maps": [[4, 0, 0]]}']] * 2), "checksum"),
    "other totals": (join([[b"H", b'{"about": {}, "maps": [[4, 0, 0]]}'], [b"E", bytes(7) + b"1"]]), "end belongs"),
    "no JSON": (forged(b"\xff\xfe{"), "header"),
    "deep JSON": (forged(b"[" * 100000), "header"),
    "no maps": (forged({"about": {}, "maps": []}), "code maps"),
    "no about": (forged({"maps": [[4, 4, 4]]}), "header"),
    "many maps": (forged({"about": {}, "maps": [[4, 4, 4]] * 257}), "code maps"),
    "a huge vocabulary": (forged({"about": {}, "maps": [[1 << 40, 4, 4]]}), "code maps"),
    "huge maps": (forged({"about": {}, "maps": [[4, 1 << 40, 1 << 40]]}), "code maps"),
    "infinite maps": (forged(b'{"about": {}, "maps": [[4, Infinity, 1]]}'), "header"),
    "negative maps": (forged({"about": {}, "maps": [[4, -4, -4]]}), "code maps"),
    "no pieces": (forged(), "without pieces"),
    "many rows": (forged(chunk=struct.pack("<I", 0xFFFFFFFF)), "without pieces"),
    "many frames": (forged(chunk=ROW(1, 1, 0xFFFFFFFF)), "numbers of frames"),
    "many pieces": (forged(chunk=ROW(1, 0xFFFFFFFF, 1)), "numbers of frames"),
    "empty pieces": (forged(chunk=ROW(1, 5, 0)), "numbers of frames"),
}


@pytest.mark.parametrize("case", CASES)
def test_foreign_and_forged_files_are_named(tmp_path, case):
    content, words = CASES[case]
    tracemalloc.start()
    try:
        assert words in check(tmp_path / "a", content, None)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        TokenReader(tmp_path / "a.tokens")


def test_records_cannot_be_lost_or_change_places(tmp_path, sample):
    content, pieces = sample
    cuts = [len(MAGIC)]
    for _, payload in split(content):
        cuts.append(cuts[-1] + RECORD.size + len(payload) + CRC.size)
    head, first, second, *rest = (content[a:b] for a, b in itertools.pairwise(cuts))
    for parts in ([head, second, first, *rest], [head, second, *rest], [head, first, first, second, *rest]):
        assert "checksum" in check(tmp_path / "a", MAGIC + b"".join(parts), pieces)


# ---- speed -------------------------------------------------------------------------------------------------------


def test_ten_seconds_of_video(tmp_path):
    rng = np.random.default_rng(10)
    codes = moving(rng, 250, 16, 16, 1024)
    start = time.perf_counter()
    writer = save(tmp_path / "a.tokens", ([frame[None]] for frame in codes), [1024])
    middle = time.perf_counter()
    read = [piece[0] for piece in TokenReader(tmp_path / "a.tokens")]
    end = time.perf_counter()
    assert np.array_equal(np.concatenate(read), codes) and writer.bits < 0.4 * raw_bits(codes, 1024)
    print(f"\n250 frames of 16x16 codes: written in {middle - start:.2f} s, read in {end - middle:.2f} s, "
          f"{writer.bits / codes.size:.2f} bits a code")
