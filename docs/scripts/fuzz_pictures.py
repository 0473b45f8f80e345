"""Damaged, huge and foreign picture files for ``fuzz.py``: chunks of PNG, segments of JPEG, headers, other formats."""

from __future__ import annotations

import gzip
import struct
import zlib
from random import Random

from fuzz_values import mutate_bytes, png_chunk

SIDES = [0, 1, 2, 97, 4096, 20_000, 65_535, 2**20, 2**31 - 1, 2**32 - 1]


def mutate_picture(rng: Random, name: str, data: bytes) -> tuple[bytes, str]:
    """A damaged file, or a hostile one that takes its name."""
    form = rng.choice(["structure", "structure", "structure", "bytes", "bytes", "bytes", "foreign", "bomb"])
    if form == "bytes":
        return mutate_bytes(rng, data)
    if form == "foreign":
        return foreign_content(rng)
    if form == "bomb":
        return _bomb(rng)
    if data.startswith(b"\x89PNG"):
        return _mutate_png(rng, data)
    if data.startswith(b"\xff\xd8"):
        return _mutate_jpeg(rng, data)
    return _mutate_numbers(rng, data)


def _mutate_png(rng: Random, data: bytes) -> tuple[bytes, str]:
    chunks, at = [], 8
    while at + 8 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += 12 + size
    operation = rng.choice(["size", "header", "drop", "twice", "swap", "text", "profile", "content"])
    row = rng.randrange(len(chunks))
    if operation == "size":
        chunks[0][1] = struct.pack(">II", rng.choice(SIDES), rng.choice(SIDES)) + chunks[0][1][8:]
    elif operation == "header":
        chunks[0][1] = chunks[0][1][:8] + bytes(rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255]) for _ in range(5))
    elif operation == "drop":
        del chunks[row]
    elif operation == "twice":
        chunks.insert(row, chunks[row])
    elif operation == "swap":
        other = rng.randrange(len(chunks))
        chunks[row], chunks[other] = chunks[other], chunks[row]
    elif operation in ("text", "profile"):
        packed = zlib.compress(bytes(rng.choice([10, 10**8])))
        name = {"text": rng.choice([b"zTXt", b"iTXt", b"tEXt", b"eXIf"]), "profile": b"iCCP"}[operation]
        chunks.insert(1, [name, b"key\x00\x00" + packed])
    else:
        chunks[row][1] = mutate_bytes(rng, chunks[row][1])[0]
    whole = data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)
    return whole, f"PNG: {operation} of {chunks[min(row, len(chunks) - 1)][0]!r}"


def _mutate_jpeg(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Segments of the header: 0xFF, a marker, two bytes of length, content. The scan behind them stays."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        (size,) = struct.unpack(">H", data[at + 2 : at + 4])
        segments.append(data[at : at + 2 + size])
        at += 2 + size
    rest = data[at:]
    operation = rng.choice(["size", "drop", "twice", "swap", "content", "exif", "comment"])
    row = rng.randrange(len(segments))
    frame = next(number for number, segment in enumerate(segments) if segment[1] in (0xC0, 0xC1, 0xC2))
    if operation == "size":
        sides = struct.pack(">HH", rng.choice(SIDES) & 0xFFFF, rng.choice(SIDES) & 0xFFFF)
        segments[frame] = segments[frame][:5] + sides + segments[frame][9:]
    elif operation == "drop":
        del segments[row]
    elif operation == "twice":
        segments[row:row] = [segments[row]] * rng.choice([1, 100])
    elif operation == "swap":
        other = rng.randrange(len(segments))
        segments[row], segments[other] = segments[other], segments[row]
    elif operation == "content":
        segments[row] = segments[row][:4] + mutate_bytes(rng, segments[row][4:])[0][:60_000]
    else:
        content = b"Exif\x00\x00" + rng.choice([b"MM\x00*", b"II*\x00", b""]) + rng.randbytes(60)
        if operation == "exif":  # one entry: orientation, with an odd type and value
            kind, value = rng.choice([2, 3, 4, 5, 7, 12, 99]), rng.choice([0, 3, 6, 9, 2**32 - 1])
            content = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01" + struct.pack(">HHII", 0x0112, kind, 1, value)
        segments.insert(
            0, b"\xff" + (b"\xe1" if operation == "exif" else b"\xfe") + struct.pack(">H", len(content) + 2) + content
        )
    return data[:2] + b"".join(segments) + rest, f"JPEG: {operation}"


def _mutate_numbers(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Numbers of the first or last bytes, where the headers of BMP, TIFF, WebP, GIF and others are."""
    changed = bytearray(data)
    places = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(min(len(data) - 4, 128)) if rng.random() < 0.6 else len(data) - 4 - rng.randrange(200)
        form, mask = rng.choice([("<I", 2**32 - 1), (">I", 2**32 - 1), ("<H", 2**16 - 1), (">H", 2**16 - 1)])
        struct.pack_into(form, changed, at, rng.choice(SIDES) & mask)
        places.append(at)
    return bytes(changed), f"numbers at {places}"


def _bomb(rng: Random) -> tuple[bytes, str]:
    """A small PNG of very many equal pixels, whole and valid."""
    width, height, depth, colour = rng.choice([(60_000, 60_000, 1, 0), (20_000, 20_000, 8, 0), (40_000, 40_000, 1, 3)])
    row = bytes(1 + (width * depth + 7) // 8)
    packer = zlib.compressobj(1)
    block = row * 100
    packed = b"".join(packer.compress(block) for _ in range(height // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    if colour == 3:
        chunks.insert(1, (b"PLTE", bytes(6)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks), f"{width} x {height} pixels"


def foreign_content(rng: Random) -> tuple[bytes, str]:
    """The file of another program, which may start something when it is opened."""
    contents = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 60\n(ran) (w) file closefile\nshowpage\n%%EOF\n",
        "EPS with a header": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, 60, 0, 0, 0, 0, 0xFFFF) + b"%!PS\n" * 20,
        "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="99999" height="9"><image href="/etc/passwd"/></svg>',
        "HTML": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "a pickle": b"cos\nsystem\n(S'touch ran'\ntR.",
        "gzip": gzip.compress(bytes(10**6), mtime=0),
        "zip": b"PK\x03\x04" + bytes(26),
        "WMF": b"\xd7\xcd\xc6\x9a\x00\x00" + struct.pack("<hhhhH", 0, 0, 30000, 30000, 1) + bytes(30),
        "text": b"just a line of text\n",
        "FITS": b"SIMPLE  =                    T" + b" " * 50 + b"BITPIX  =                  -64" + b" " * 50,
        "PSD": b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(12),
        "PPM": b"P6\n99999 99999\n255\n",
        "TGA": b"\x00\x00\x02" + bytes(9) + struct.pack("<HHBB", 65535, 65535, 24, 0),
        "ICO": b"\x00\x00\x01\x00\xff\xff" + bytes(32),
        "XBM": b"#define im_width 99999\n#define im_height 99999\nstatic char im_bits[] = {0};\n",
        "video": b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(64),
    }
    name = rng.choice(sorted(contents))
    return contents[name], f"{name} with the name of a picture"
