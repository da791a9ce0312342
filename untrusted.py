"""Checks untrusted files before they are read, so that a forged file cannot take more time or memory than its size
justifies.

    with open_regular(path) as file: ...       # refuses FIFOs and devices, which never end
    settings = read_json(path, 1 << 20)        # refuses files of more bytes
    check_weights("model.pth")                 # before torch.load, which allocates the memory that a file asks for

OSError for a file that cannot be read, ValueError (for a pickle, many others too) for a forged one. Works alone.
"""
import collections
import errno
import io
import json
import math
import os
import pickle
import stat
import zipfile

SETTINGS = 1 << 20      # most bytes of a settings file
MAX_PICKLE = 1 << 22    # most bytes of a pickle; the state of a run with 1700 tensors takes 160 KB
MAX_ODD_KEYS = 1000     # most dict keys that are neither text nor small numbers: others can be made to collide
ITEM_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
              "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1}


def open_regular(path):
    """The file, open for reading bytes. OSError for anything but a regular file: FIFOs, devices, /dev/stdin."""
    # Without O_NONBLOCK, opening a FIFO that nobody writes to would block for ever. Regular files ignore the flag.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return file


def read_text(path, most):
    """The text of a UTF-8 file of up to `most` bytes, with or without a byte order mark. ValueError if it has more."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most >> 20} MiB" if most >> 20 else f"more than {most} bytes")
    return content.decode("utf-8-sig")


def read_json(path, most, **how):
    """The contents of a JSON file of up to `most` bytes; **how: arguments of json.loads. ValueError, OSError."""
    try:
        return json.loads(read_text(path, most), **how)
    except RecursionError as error:  # nested too deeply
        raise ValueError(str(error)) from None


# ---- weights -----------------------------------------------------------------------------------------------------


def check_weights(path):
    """ValueError unless a .pth, .pt or .ckpt file, of the new or old format, asks for no more memory than a few times
    its size, and has no damaged parts. (safetensors checks its own files.)"""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        is_archive = file.read(4) == b"PK\3\4"  # as torch.load has it
        file.seek(0)
        if not is_archive:
            return check_old_weights(file, size)
        with zipfile.ZipFile(file) as archive:
            check_archive(archive, size)
            if damaged := archive.testzip():  # PyTorch does not look at the checksums that it writes
                raise ValueError(f"{damaged} does not match its checksum")
            pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1 or len(set(archive.namelist())) < len(archive.namelist()):
                raise ValueError("it has no data.pkl, or parts of the same name")
            name, = pickles
            if archive.getinfo(name).file_size > MAX_PICKLE:
                raise ValueError(f"{name} has more than {MAX_PICKLE >> 20} MiB")
            contents = Contents(io.BytesIO(archive.read(name)), size)
            contents.load()
            for key, storage in contents.storages.items():
                there = archive.getinfo(name.removesuffix("data.pkl") + f"data/{key}").file_size
                if storage.size > there:
                    raise ValueError(f"part {key} is said to have {storage.size} bytes, and has {there}")


def check_archive(archive, size):
    """ValueError if a zipfile.ZipFile of `size` bytes unpacks to much more: PyTorch does not compress weights."""
    if (unpacked := sum(part.file_size for part in archive.infolist())) > 2 * size + (1 << 24):
        raise ValueError(f"its {size} bytes would unpack to {unpacked}")


def check_old_weights(file, size):
    """`check_weights` for PyTorch's format before 2020: pickles, the fourth with the weights' names, then their bytes.
    """
    head = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(5):
        contents = Contents(head, size)
        contents.load()


class Storage:
    """A storage of `size` bytes, whose numbers take `item_size` bytes each."""

    def __init__(self, kind, count):
        self.item_size = ITEM_SIZES[kind.__name__.removesuffix("Storage")]
        self.size = self.item_size * count


class Harmless:
    """Replaces the objects that a pickle would create."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __setstate__(self, _):
        pass

    append = extend = __setstate__


class TooMuch:
    """Replaces functions and classes that allocate as much memory as the pickle says."""

    def __new__(cls, *_, **__):
        raise ValueError(f"it has {cls.__name__} called, which no weights need")


class Contents(pickle._Unpickler):  # Python's: the one in C takes 16 GB for a number in eight bytes
    """Reads a pickle of torch.save without creating its objects; `storages`: {key: Storage}. ValueError if tensors or
    storages exceed the file's `size` in bytes, or if hashing dict keys could take for ever."""

    def __init__(self, file, size):
        super().__init__(file, encoding="latin-1")
        self.file_size, self.storages = size, {}
        self.storage_bytes = self.tensor_bytes = self.odd_keys = 0
        self.calls = {"OrderedDict": self.collection, "Counter": self.collection, "set": self.collection,
                      "_rebuild_tensor": self.tensor, "_rebuild_tensor_v2": self.tensor,
                      "_rebuild_tensor_v3": self.tensor, "_rebuild_from_type_v2": self.subclass,
                      "encode": self.encoded}

    def find_class(self, module, name):
        if name in self.calls:
            return self.calls[name]
        allowed = "Size", "device", "Parameter", "_get_layout", "_rebuild_parameter", "_rebuild_parameter_with_state"
        if name == "bytearray" or module.split(".")[0] == "torch" and name not in allowed:
            return type(name, (TooMuch,), {})
        return Harmless  # torch.load itself refuses all names that are not PyTorch's

    def persistent_load(self, about):
        _, kind, key, _, count, *_ = about
        if not isinstance(key, str):
            raise ValueError("a part without a name")
        storage = Storage(kind, number(count))
        self.storage_bytes += storage.size if key not in self.storages else 0
        if storage.size > self.storages.setdefault(key, storage).size or self.storage_bytes > self.file_size:
            raise ValueError(f"part {key} is said to have {storage.size} bytes, in a file of {self.file_size}")
        return storage

    def tensor(self, storage, _, size, *__):
        """Replaces torch._utils._rebuild_tensor and similar. A tensor may have more elements than its storage (strides
        of 0, say), so sum up the sizes."""
        self.tensor_bytes += math.prod(map(number, size)) * storage.item_size
        if self.tensor_bytes > 4 * self.file_size + (1 << 24):
            raise ValueError(f"a tensor of {'x'.join(map(str, size))} in a file of {self.file_size} bytes")
        return Harmless()

    def subclass(self, call, _, arguments, *__):
        return call(*arguments)

    def encoded(self, text, encoding="latin1"):
        if encoding not in ("latin1", "latin-1"):  # others may take for ever
            raise ValueError(f"bytes in {encoding}")
        return text

    def collection(self, *parts):
        for part in parts:
            for entry in part if isinstance(part, (list, tuple)) else ():
                self.look_at_key(entry[0] if isinstance(entry, list) and entry else entry)  # Python 2 wrote lists
        return collections.OrderedDict()

    def look_at_key(self, key):
        """ValueError for keys that are no names: hashing deeply nested tuples can crash the program."""
        if not plain(key):
            self.odd_keys += 1
            if self.odd_keys > MAX_ODD_KEYS or isinstance(key, tuple) and not all(map(plain, key)):
                raise ValueError("keys that are no names")

    def load_setitem(self):
        _, key = self.stack.pop(), self.stack.pop()
        self.look_at_key(key)

    def load_setitems(self):
        for key in self.pop_mark()[::2]:
            self.look_at_key(key)

    dispatch = {**pickle._Unpickler.dispatch, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    for code in (pickle.DICT, pickle.FROZENSET, pickle.ADDITEMS, pickle.BYTEARRAY8):  # PyTorch does not know these
        del dispatch[code[0]]


def number(value):
    if type(value) is not int or value < 0:
        raise ValueError("a size that is no number")
    return value


def plain(key):
    return isinstance(key, (str, type(None))) or isinstance(key, int) and abs(key) < 1 << 60
