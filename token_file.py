"""Video tokens in a file: entropy-coded, streamed, and checked. This file works alone: numpy and the standard library.

    with TokenWriter("a.tokens", about, vocabulary=[1024]) as writer:
        for codes in pieces:                  # a list with one integer array T h w for each code map
            writer.write(codes)
    reader = TokenReader("a.tokens")          # reads the file once, and refuses a damaged or foreign one
    print(reader.about, reader.frames, reader.bits)
    pieces = list(reader)                     # or piece by piece: the same arrays, int64

A file is the 8 bytes `MAGIC` (the last is the version) and records: kind (1 byte), length (uint32), payload, CRC-32 of
all that precedes it in the file except the earlier CRCs, so that lost or swapped records are noticed too.
  H  JSON: {"about": the caller's dict, "maps": [[number of codes, h, w], ...]}
  C  a chunk: the number of frames of its pieces, then the codes of each map, coded separately
  E  the number of frames of each map (uint64); nothing follows it
Memory is bounded by a chunk. All numbers are little-endian. Codes are coded by rANS (Duda, arXiv 1311.2540) in integer
arithmetic, so every machine restores the same codes; and on many lanes at once (Giesen, arXiv 1402.3392), which numpy
steps together. For each map of a chunk the writer takes the smallest of three codings: equal frequencies, adaptive
frequencies, or a model of where a code was last seen.
"""
import contextlib
import functools
import itertools
import json
import os
import struct
import zlib

import numpy as np

MAGIC = b"\x93TOKENS\x01"
MAX_MAPS, MAX_VOCABULARY, MAX_FRAME = 256, 1 << 20, 1 << 20  # code maps; codes in a codebook, in a frame
MAX_PIECE, MAX_ABOUT, MAX_RECORD = 1 << 23, 1 << 20, 1 << 28  # codes in a piece; bytes of `about`, of a record
CHUNK_CODES, CHUNK_PIECES = 1 << 20, 1 << 16  # most codes and pieces of a chunk (a single piece may have more codes)
RECORD, CRC = struct.Struct("<cI"), struct.Struct("<I")


class TokenError(ValueError):
    """A file that cannot be used as tokens; the message is one line that names the file and what is wrong."""


# ---- rANS --------------------------------------------------------------------------------------------------------

PRECISION = 24  # frequencies sum to 2^24, so that a vocabulary of 2^20 fits
SHIFT, SLOT, TOP = np.uint64(PRECISION), np.uint64((1 << PRECISION) - 1), np.uint64(64 - PRECISION)
WORD, LOW = np.uint64(32), np.uint64(1 << 32)  # a state is in [2^32, 2^64) between steps
LANE_BITS, LANE_CODES, MAX_LANES = 1 << 15, 1 << 13, 1024  # a lane costs 6 bytes, 0.15 %; fewer are slower


class Frequencies:
    """Frequencies of `symbols` symbols in each of `contexts` contexts: equal, or with `learn` adapted to the codes so
    far.

    edges[c * symbols + s]: where the interval of symbol s in context c begins, plus c * 2^24. The edges are updated
    from the counts only now and then, since an update takes time proportional to the vocabulary.
    """

    def __init__(self, symbols, contexts=1, learn=True):
        self.symbols, self.learn = symbols, learn
        self.counts = np.ones((contexts, symbols), np.int64)  # a code adds four, so unseen ones count a quarter each
        self.seen = 0
        self.refresh()

    def refresh(self):
        contexts, symbols = self.counts.shape
        total = self.counts.cumsum(1)
        edges = total * ((1 << PRECISION) - symbols) // total[:, -1:] + np.arange(1, symbols + 1)  # never empty
        edges += np.arange(contexts)[:, None] << PRECISION
        self.edges = np.concatenate([[0], edges.ravel()]).astype(np.uint64)
        self.room = max(64, min(self.seen // 16, self.counts.size)) if self.learn else 1 << 62

    def add(self, index):
        """index: context * symbols + symbol of each code, at most `room` of them."""
        if self.learn:
            np.add.at(self.counts.reshape(-1), index, 4)
        self.seen += len(index)
        self.room -= len(index)
        if not self.room:
            self.refresh()


class Encoder:
    """Collects intervals in the order of decoding; `finish` codes them, last first. bits: about how many they take."""

    def __init__(self):
        self.parts, self.bits = [], 0.0

    def code(self, model, contexts, symbols):
        """contexts, symbols: int64 arrays of one length. Returns the symbols, as Decoder.code does."""
        done = 0
        while done < len(symbols):
            cut = slice(done, done + model.room)
            index = contexts[cut] * model.symbols + symbols[cut]
            start = model.edges[index]
            size = model.edges[index + 1] - start
            self.parts.append(((start & SLOT).astype(np.uint32), size.astype(np.uint32)))
            self.bits += PRECISION * len(index) - float(np.log2(size.astype(np.float64)).sum())
            done += len(index)
            model.add(index)
        return symbols

    def finish(self):
        """bytes: the number of lanes, their states, and the words in the order in which the decoder takes them."""
        count = sum(len(start) for start, _ in self.parts)
        lanes = min(max(int(self.bits) // LANE_BITS, count // LANE_CODES, 1), MAX_LANES)
        states, words = np.full(lanes, LOW), []
        for start, size in reversed(self.parts):
            for i in reversed(range(0, len(start), lanes)):
                low, width = start[i:i + lanes].astype(np.uint64), size[i:i + lanes].astype(np.uint64)
                state = states[:len(low)]
                full = state >= width << TOP
                words.append(state[full].astype("<u4"))
                state[full] >>= WORD
                quotient = state // width
                state[:] = (quotient << SHIFT) + (state - quotient * width) + low
        return struct.pack("<H", lanes) + states.astype("<u8").tobytes() + b"".join(w.tobytes() for w in words[::-1])


class Decoder:
    """data: what Encoder.finish gave, for at least `count` codes. TokenError if it cannot be that."""

    def __init__(self, data, count):
        lanes = struct.unpack_from("<H", data)[0] if len(data) >= 2 else 0
        if not max(count // LANE_CODES, 1) <= lanes <= MAX_LANES or len(data) < 2 + 8 * lanes or (len(data) - 2) % 4:
            raise TokenError("damaged: no entropy-coded data")
        self.states = np.frombuffer(data, "<u8", lanes, 2).astype(np.uint64)
        self.words = np.frombuffer(data, "<u4", -1, 2 + 8 * lanes).astype(np.uint64)
        self.taken = 0

    def code(self, model, contexts, symbols=None):
        """contexts: int64 array; returns as many symbols."""
        result = np.empty(len(contexts), np.int64)
        done = 0
        while done < len(contexts):
            cut = slice(done, done + model.room)
            index = self.intervals(model.edges, contexts[cut].astype(np.uint64) << SHIFT)
            result[cut] = index - contexts[cut] * model.symbols
            done += len(index)
            model.add(index)
        return result

    def intervals(self, edges, base):
        """Decode one interval for each offset in `base` (uint64), the lanes taking turns: the index (int64) of the
        interval between `edges` that holds offset + slot of the lane's state. Advances the states."""
        found = np.empty(len(base), np.int64)
        for i in range(0, len(base), len(self.states)):
            offsets = base[i:i + len(self.states)]
            state = self.states[:len(offsets)]
            position = offsets + (state & SLOT)
            index = found[i:i + len(offsets)] = np.searchsorted(edges, position, "right") - 1
            start = edges[index]
            state[:] = (edges[index + 1] - start) * (state >> SHIFT) + (position - start)
            empty = state < LOW
            words = self.words[self.taken:self.taken + np.count_nonzero(empty)]
            self.taken += len(words)
            if len(words) < np.count_nonzero(empty):
                raise TokenError("damaged: entropy-coded data end too early")
            state[empty] = state[empty] << WORD | words
        return found

    def finish(self):
        """TokenError unless the states are back where the encoder began: a strong check of all that was decoded."""
        if self.taken != len(self.words) or (self.states != LOW).any():
            raise TokenError("damaged: entropy-coded data do not end where they should")


# ---- the codes of one map, and chunks ----------------------------------------------------------------------------

HISTORY = 4  # codes remembered for each position
AROUND = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
NEW = HISTORY + len(AROUND)  # the rank of a code that is not among the candidates
# (first row, first column) of four grids of every second position, in coding order. In the third and fourth grid, a
# position knows at least four neighbours in its own frame, in the second grid four diagonal ones.
GRIDS = [(0, 0), (1, 1), (0, 1), (1, 0)]


def code_flat(coder, shape, num_codes, codes=None, learn=True):
    """Code (or, without `codes`, decode) T h w codes by adaptive frequencies, or with learn=False by equal ones."""
    model, contexts = Frequencies(max(num_codes, 2), learn=learn), np.zeros(int(np.prod(shape)), np.int64)
    return coder.code(model, contexts, None if codes is None else codes.ravel()).reshape(shape)


def code_as_video(coder, shape, num_codes, codes=None):
    """Code (or, without `codes`, decode) T h w codes by where they were last seen; new codes by adaptive frequencies.

    Candidates for a position are its last four codes, and the codes of its eight neighbours: in this frame if they are
    coded already, else in the previous frame. What is coded is the rank of the first candidate that is right. Its
    context is the position's last rank, and how many neighbours kept their code (rank 0). A frame is coded as four
    interleaved grids, each as a whole. Codes of eight real clips (two k-means codebooks of 16x16 and 8x8 pixels) took
    28 % of their plain bits on average; frequencies alone 78 %, LZMA 31 %, which was 3 % better on two of the sixteen.
    """
    frames, height, width = shape
    result = np.empty(shape, np.int64)
    ranks, novel = Frequencies(NEW + 1, contexts=(NEW + 1) * 9), Frequencies(max(num_codes, 2))
    rank = np.full((height, width), NEW)
    history = np.full((HISTORY, height, width), -1)
    known = np.full((height + 2, width + 2), -1)  # each position's newest code, inside a border that matches nothing
    for t in range(frames):
        for y, x in GRIDS:
            here = np.s_[y::2, x::2]
            around = [np.s_[1 + y + dy:height + 1 + dy:2, 1 + x + dx:width + 1 + dx:2] for dy, dx in AROUND]
            candidates = np.stack([*history[:, y::2, x::2], *(known[near] for near in around)]).reshape(NEW, -1)
            kept = np.pad(rank == 0, 1, "edge")
            contexts = rank[here] * 9 + sum(kept[near] for near in around)
            true = None if codes is None else codes[t][here].ravel()
            found = coder.code(ranks, contexts.ravel(), None if codes is None else first(candidates == true, NEW))
            values = candidates[np.minimum(found, NEW - 1), np.arange(len(found))]
            fresh = np.flatnonzero(found == NEW)
            values[fresh] = coder.code(novel, np.zeros_like(fresh), None if codes is None else true[fresh])
            known[1:-1, 1:-1][here] = values.reshape(contexts.shape)
            rank[here] = found.reshape(contexts.shape)
        result[t] = known[1:-1, 1:-1]
        moved = np.concatenate([result[t:t + 1], history[:-1]])  # this frame's codes to the front, others back by one
        history = np.where(np.arange(HISTORY)[:, None, None] <= first(history == result[t], HISTORY), moved, history)
    return result


def first(true, otherwise):
    """Index of the first True along axis 0; `otherwise` if there is none."""
    return np.where(true.any(0), true.argmax(0), otherwise)


def modes(shape):
    """The ways to code T h w codes; a chunk stores the index of its way. `code_as_video` is slow for tiny maps."""
    return [functools.partial(code_flat, learn=False), code_flat, code_as_video][:3 if shape[1] * shape[2] >= 16 else 2]


def pack(codes, num_codes):
    """codes: T h w integers in [0, num_codes) -> (mode, bytes), by the way that takes the fewest bits."""
    encoders = []
    for code in modes(codes.shape):
        encoders.append(Encoder())
        code(encoders[-1], codes.shape, num_codes, codes)
    best = min(encoders, key=lambda encoder: encoder.bits)
    return encoders.index(best), best.finish()


def unpack(mode, data, shape, num_codes):
    """Undo `pack`: int64 T h w. TokenError for anything else."""
    decoder = Decoder(data, int(np.prod(shape)))
    if mode >= len(modes(shape)):
        raise TokenError(f"damaged: codes in an unknown mode, {mode}")
    codes = modes(shape)[mode](decoder, shape, num_codes)
    decoder.finish()
    if codes.min(initial=0) < 0 or codes.max(initial=0) >= num_codes:
        raise TokenError(f"damaged: a code outside of the vocabulary of {num_codes}")
    return codes


def pack_chunk(pieces, vocabulary):
    """The bytes of a chunk. pieces: lists of int arrays T h w. Format: the number of rows; the rows, each the number of
    consecutive pieces with equal numbers of frames, and these numbers for each map (uint32); then mode, length and data
    of each map."""
    rows = [(len(list(same)), *frames) for frames, same in itertools.groupby([len(c) for c in p] for p in pieces)]
    parts = [struct.pack("<I", len(rows)), np.array(rows, "<u4").tobytes()]
    for codes, num_codes in zip(zip(*pieces), vocabulary):
        mode, data = pack(np.concatenate(codes), num_codes)
        parts += [struct.pack("<BI", mode, len(data)), data]
    return b"".join(parts)


def chunk_rows(payload, maps):
    """(rows as lists, frames of each map, offset at which the maps begin) of a chunk. maps: (codes, h, w) of each.
    TokenError if a number exceeds the limits."""
    count = struct.unpack_from("<I", payload)[0] if len(payload) >= 4 else 0
    end = 4 + 4 * count * (1 + len(maps))
    if not count or end > len(payload):
        raise TokenError("damaged: a chunk without pieces")
    rows = np.frombuffer(payload, "<u4", count * (1 + len(maps)), 4).reshape(count, -1).astype(np.int64)
    areas = np.array([float(h * w) for _, h, w in maps])
    sizes = rows[:, 1:] @ areas  # codes in a piece: a float cannot overflow
    if min(rows[:, 0].min(), areas.min(), sizes.min()) < 1 or (rows[:, 0] * sizes).sum() > MAX_PIECE:
        raise TokenError("damaged: impossible numbers of frames")
    return rows.tolist(), (rows[:, :1] * rows[:, 1:]).sum(0).tolist(), end


def unpack_chunk(payload, maps):
    """Undo `pack_chunk`, piece by piece, with int64 codes."""
    rows, totals, at = chunk_rows(payload, maps)
    streams = []
    for frames, (num_codes, height, width) in zip(totals, maps):
        mode, length = struct.unpack_from("<BI", payload, at) if at + 5 <= len(payload) else (0, MAX_RECORD)
        data = payload[at + 5:at + 5 + length]
        at += 5 + length
        streams.append(unpack(mode, data, (frames, height, width), num_codes))
    if at != len(payload):
        raise TokenError("damaged: a chunk is longer or shorter than its parts")
    begin = np.zeros(len(maps), np.int64)
    for repeat, *frames in rows:
        for _ in range(repeat):
            yield [codes[b:b + n] for codes, b, n in zip(streams, begin.tolist(), frames)]
            begin += frames


# ---- files -------------------------------------------------------------------------------------------------------


class TokenWriter:
    """Context manager that writes `path` through a temporary file: complete, or, after an exception, not at all.

    about: a dict that JSON can hold, with what decoding needs (model, size, frames per second, ...); the reader gives
    it back. vocabulary: the number of codes of each map. bits: size of the chunks so far; to the file, `about` and 150
    bytes come in addition. ValueError for impossible arguments, TypeError for what JSON cannot hold.
    """

    def __init__(self, path, about, vocabulary):
        self.path, self.vocabulary = os.fspath(path), [int(n) for n in vocabulary]
        if not 1 <= len(self.vocabulary) <= MAX_MAPS or not all(1 <= n <= MAX_VOCABULARY for n in self.vocabulary):
            raise ValueError(f"vocabulary {vocabulary}: 1 to {MAX_MAPS} numbers of 1 to {MAX_VOCABULARY} are possible")
        if len(json.dumps(about)) > MAX_ABOUT:
            raise ValueError(f"about takes {len(json.dumps(about))} bytes; at most {MAX_ABOUT} are possible")
        self.about, self.shapes, self.waiting, self.waiting_codes = about, None, [], 0
        self.frames, self.bits = [0] * len(self.vocabulary), 0

    def __enter__(self):
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self.temporary, self.crc = f"{self.path}.{os.getpid()}.tmp", zlib.crc32(MAGIC)
        self.file = open(self.temporary, "wb")
        self.file.write(MAGIC)
        return self

    def write(self, codes):
        """codes: one integer array T h w for each map. T may differ and be 0; h and w are the same in every piece."""
        codes = [np.asarray(c) for c in codes]
        if len(codes) != len(self.vocabulary) or any(c.ndim != 3 or c.dtype.kind not in "iu" for c in codes):
            raise ValueError(f"{len(self.vocabulary)} integer arrays T h w are wanted, not "
                             + ", ".join(f"{c.dtype} {c.shape}" for c in codes))
        for c, num_codes in zip(codes, self.vocabulary):
            if c.size and (c.min() < 0 or c.max() >= num_codes):
                raise ValueError(f"codes from {c.min()} to {c.max()} in a vocabulary of {num_codes}")
        size, shapes = sum(c.size for c in codes), [c.shape[1:] for c in codes]
        if not size:
            return
        if size > MAX_PIECE or not all(1 <= h * w <= MAX_FRAME for h, w in shapes):
            raise ValueError(f"{size} codes, h w {shapes}: at most {MAX_PIECE} a piece and {MAX_FRAME} a frame, please")
        if self.shapes is None:
            self.start(shapes)
        if shapes != self.shapes:
            raise ValueError(f"code maps of h w {shapes} after {self.shapes}")
        if self.waiting_codes + size > CHUNK_CODES or len(self.waiting) == CHUNK_PIECES:
            self.flush()
        self.waiting.append([c.astype(np.int64) for c in codes])  # a copy: the caller may overwrite the array
        self.waiting_codes += size
        self.frames = [n + len(c) for n, c in zip(self.frames, codes)]

    def start(self, shapes):
        self.shapes = shapes
        maps = [(n, *shape) for n, shape in zip(self.vocabulary, shapes)]
        self.record(b"H", json.dumps({"about": self.about, "maps": maps}).encode())

    def flush(self):
        if self.waiting:
            self.bits += 8 * self.record(b"C", pack_chunk(self.waiting, self.vocabulary))
            self.waiting, self.waiting_codes = [], 0

    def record(self, kind, payload):
        head = RECORD.pack(kind, len(payload))
        self.crc = zlib.crc32(payload, zlib.crc32(head, self.crc))
        return self.file.write(head + payload + CRC.pack(self.crc))

    def __exit__(self, error_type, *_):
        try:
            with self.file:
                if error_type is None:
                    if self.shapes is None:
                        self.start([(0, 0)] * len(self.vocabulary))
                    self.flush()
                    self.record(b"E", np.array(self.frames, "<u8").tobytes())
            if error_type is None:
                os.replace(self.temporary, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.temporary)


def records(path):
    """Yields (kind, payload) of one H, any number of C, and one E. TokenError for a wrong checksum, or for bytes after
    the end."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(len(MAGIC))
        if not magic or not MAGIC.startswith(magic[:7]):
            raise TokenError("no token file")
        if magic[7:] > MAGIC[7:]:
            raise TokenError(f"version {magic[7]} of token files, newer than this program's {MAGIC[7]}")
        crc, kind, wanted = zlib.crc32(magic), b"", b"H"
        while kind != b"E":
            head = file.read(RECORD.size)
            kind, length = RECORD.unpack(head) if len(head) == RECORD.size else (b"", size)
            if length + CRC.size > size - file.tell():
                raise TokenError("truncated: it ends before its end mark")
            payload = file.read(min(length, MAX_RECORD if kind == b"C" else 2 * MAX_ABOUT))
            crc = zlib.crc32(payload, zlib.crc32(head, crc))
            if kind not in wanted or file.read(CRC.size) != CRC.pack(crc):
                raise TokenError("damaged: a checksum does not match")
            wanted = b"CE"
            yield kind, payload
        if file.tell() != size:
            raise TokenError("damaged: something follows its end")


def parse_header(payload):
    """(about, maps) of a header. TokenError if a number exceeds the limits."""
    try:
        header = json.loads(payload)
        about, maps = header["about"], [(int(n), int(h), int(w)) for n, h, w in header["maps"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise TokenError("damaged: an unreadable header") from None
    if not 1 <= len(maps) <= MAX_MAPS or any(not 1 <= n <= MAX_VOCABULARY or min(h, w) < 0 or h * w > MAX_FRAME
                                             for n, h, w in maps):
        raise TokenError(f"damaged: impossible code maps {str(maps)[:60]}")
    return about, maps


def keep_maps(path, target, count):
    """Copy the first `count` maps of the token file `path` to `target`: with a residual quantizer, its first levels.
    TokenError if the file has fewer maps, or as for TokenReader."""
    reader = TokenReader(path)
    if not 1 <= count <= len(reader.maps):
        raise TokenError(f"{path}: holds {len(reader.maps)} code maps, and {count} are to be kept")
    with TokenWriter(target, reader.about, [codes for codes, *_ in reader.maps[:count]]) as writer:
        for piece in reader:
            writer.write(piece[:count])


class TokenReader:
    """Reads what TokenWriter wrote. Iterating over it, as often as you like, gives the pieces: lists of int64 arrays
    T h w.

    about: the writer's dict. maps: (number of codes, h, w) of each. frames: number of frames of each map. bits: size of
    the chunks. The constructor checks the whole file, but does not decode it. Memory is bounded by a chunk, whatever
    the file claims. The number of codes is what the file claims: compare `frames` with what you expect from `about`.
    TokenError for a file that is damaged or foreign (while iterating, only if it was forged); OSError if it cannot be
    read.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        list(self.read(decode=False))

    def __iter__(self):
        return self.read(decode=True)

    def read(self, decode):
        """Read the file and check all of it; with `decode`, yield the codes. TokenError as above."""
        try:
            for kind, payload in records(self.path):
                if kind == b"H":
                    about, maps = parse_header(payload)
                    frames, bits = np.zeros(len(maps), np.int64), 0
                elif kind == b"C":
                    frames += chunk_rows(payload, maps)[1]
                    bits += 8 * (RECORD.size + len(payload) + CRC.size)
                    if decode:
                        yield from unpack_chunk(payload, maps)
                elif payload != frames.astype("<u8").tobytes():
                    raise TokenError("damaged: its end belongs to another file")
            self.about, self.maps, self.frames, self.bits = about, maps, frames.tolist(), bits
        except TokenError as error:
            raise TokenError(f"{self.path}: {error}") from None
