"""Files as they lie on disk: compressed or not, in whatever encoding."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError

SAMPLE = 2**18
"""Bytes from the top of a file by which its encoding and layout are recognised."""
COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""Extension and first bytes of what is decompressed on the way."""
PIECE = 2**16
"""Bytes decompressed at a time."""
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
LIKELY = [f"cp{number}" for number in (*range(1250, 1257), 932, 949)] + ["koi8-r", "gb18030", "big5", "euc-jp", "tis-620"]
"""What text that is neither UTF-8 nor UTF-16 is likely to be, so that no guess is an encoding of old mainframes."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def extension_of(path: Path) -> str:
    """Returns the extension in lower case, without that of the compression: `.csv` of `ROWS.CSV.gz`."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading, decompressing it when its first bytes say so.

    Raises:
        UserError: the package that decompresses it is missing.
    """
    with path.open("rb") as file:
        start = file.read(6)
    kind = next((suffix for suffix, magic in COMPRESSED.items() if start.startswith(magic)), None)
    if kind == ".zst":
        return _open_zst(path)
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(kind or "", open)
    return opened(path, "rb")


def _open_zst(path: Path) -> IO[bytes]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise UserError(f"{path}: zst needs the package zstandard: pip install zstandard, or decompress the file") from None
    return io.BufferedReader(_Zst(path.open("rb"), zstandard.ZstdDecompressor), PIECE)


class _Zst(io.RawIOBase):
    """Frames of Zstandard, one after the other; unlike the package's own reader it notices that the last one is cut short."""

    def __init__(self, file: IO[bytes], decompressor: Callable[[], Any]) -> None:
        self.file, self.decompressor = file, decompressor
        self.frame: Any = None
        self.packed = self.plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.plain:
            self.packed = self.packed or self.file.read(PIECE)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("its last frame is not complete")
                return 0
            self.frame = self.frame or self.decompressor().decompressobj()
            self.plain, self.packed = self.frame.decompress(self.packed), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.plain))
        buffer[:size], self.plain = self.plain[:size], self.plain[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def damage(error: Exception) -> str | None:
    """Says in what way a file is damaged; None when `error` is about something else."""
    if isinstance(error, (zlib.error, EOFError, lzma.LZMAError, gzip.BadGzipFile)) or type(error).__name__ == "ZstdError":
        return f"the compressed file is damaged or cut short ({error})"
    if type(error) is OSError and error.errno is None:  # what bz2 raises
        return f"the compressed file is damaged ({error})"
    return None


def hidden_damage(path: Path) -> str | None:
    """Says in what way a compressed file is damaged; None when it is whole: what it holds is then what was packed.

    Damaged bytes may decompress to nonsense, and show in the checksum at the end only.
    """
    try:
        with open_bytes(path) as file:
            if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
                return None
            while file.read(PIECE):
                pass
    except Exception as error:
        return damage(error)
    return None


def read_sample(path: Path) -> tuple[bytes, bool]:
    """Returns (the first SAMPLE bytes, whether these are all).

    Raises:
        UserError: it cannot be read at all.
    """
    parts: list[bytes] = []
    try:
        with open_bytes(path) as file:
            size = 0
            while size <= SAMPLE and (part := file.read(SAMPLE + 1 - size)):
                parts.append(part)
                size += len(part)
    except OSError as error:
        if damage(error) is None:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the line is named when the rows are read
        if damage(error) is None:
            raise
    sample = b"".join(parts)
    return sample[:SAMPLE], len(sample) <= SAMPLE


def find_encoding(path: Path, sample: bytes, whole: bool) -> tuple[str, bool]:
    """Returns (encoding, whether it is a guess) of the beginning of a file.

    Raises:
        UserError: nothing fits.
    """
    for mark, encoding in _MARKS:
        if sample.startswith(mark):
            return encoding, False
    if b"\x00" in sample:
        # Of two bytes of UTF-16 one is zero in nearly every Western character, and in every line end of any text.
        zeros = [sample[start::2].count(0) for start in (0, 1)]
        if max(zeros) > 10 * min(zeros):
            return ("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"), False
        raise UserError(f"{path}: not a text file (it holds zero bytes): name its format, or convert it to text")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=whole)
    except UnicodeDecodeError:
        return _guess(path, sample), True
    return "utf-8", False


def _guess(path: Path, sample: bytes) -> str:
    import chardet

    sample = sample[: sample.rfind(b"\n") + 1] or sample  # no character cut in two
    found = chardet.detect(sample, include_encodings=LIKELY, prefer_superset=True)
    encoding = codecs.lookup(found["encoding"] or "ascii").name
    try:
        sample.decode(encoding)
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: neither UTF-8 nor UTF-16, and no guess fits: set encoding, as in encoding: cp1252, or name its format"
        ) from None
    return encoding


class TextFile:
    """The lines of a text file, decompressed and decoded; `line` is the number of the last one that was read.

    Args:
        path: the file.
        encoding: of the text; a byte order mark is no part of it.
    """

    def __init__(self, path: Path, encoding: str) -> None:
        self.path, self.encoding, self.line = path, encoding, 0
        self.codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding

    def __iter__(self) -> Iterator[str]:
        """Yields every line with its end.

        Raises:
            UserError: a damaged file, or bytes that are no text in this encoding; names the line.
        """
        try:
            # newline="": a line end inside a quoted cell is data.
            with io.TextIOWrapper(open_bytes(self.path), encoding=self.codec, newline="") as file:
                for text in file:
                    self.line += 1
                    yield text
        except UnicodeDecodeError as error:
            raise self._undecodable(error) from None
        except Exception as error:
            damaged = damage(error)
            if damaged:
                raise UserError(f"{self.path}:{self.line + 1}: cannot be read: {damaged}: fetch it again") from None
            if isinstance(error, OSError):
                raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None
            raise

    def _undecodable(self, error: UnicodeDecodeError) -> UserError:
        damaged = hidden_damage(self.path)
        if damaged:
            return UserError(f"{self.path}:{self.line + 1}: cannot be read: {damaged}: fetch it again")
        line, byte = self.line + 1, error.object[error.start]
        if not self.encoding.startswith(("utf-16", "utf-32")):  # whose line ends are no single bytes
            with open_bytes(self.path) as raw:
                for number, data in enumerate(raw, 1):
                    try:
                        data.decode(self.encoding)
                    except UnicodeDecodeError as exact:
                        line, byte = number, data[exact.start]
                        break
        fix = "save it as UTF-8, or set encoding, as in encoding: cp1252"
        return UserError(f"{self.path}:{line}: byte 0x{byte:02x} is not {self.encoding} ({error.reason}): {fix}")
