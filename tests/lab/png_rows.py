"""Reads PNG images with what Python brings along."""

import struct
import zlib


def read_png(path):
    """Width, height and rows of pixels (bytes, one value per pixel) of an 8 bit grey, RGB or RGBA image (PNG specification, 2nd edition)."""
    data = open(path, "rb").read()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise SystemExit(f"{path} is not a PNG image")
    at, packed = 8, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed += body
        at += size + 12
    channels = {0: 1, 2: 3, 3: 1, 6: 4}.get(colour)
    if channels is None or depth != 8 or interlaced:
        raise SystemExit(f"{path}: an image of colour type {colour}, depth {depth} is not read here")
    raw, stride = zlib.decompress(packed), width * channels
    rows, above = [], bytearray(stride)
    for y in range(height):
        line = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        unfilter(raw[y * (stride + 1)], line, above, channels)
        above = line
        rows.append([bytes(line[x : x + min(channels, 3)]) for x in range(0, stride, channels)])
    return width, height, rows


def unfilter(kind, line, above, step):
    """Undoes a row's filter in place (section 9)."""
    if kind == 2:
        line[:] = bytes((a + b) & 255 for a, b in zip(line, above))
        return
    if kind == 0:
        return
    for x in range(len(line)):
        left = line[x - step] if x >= step else 0
        corner = above[x - step] if x >= step else 0
        if kind == 1:
            guess = left
        elif kind == 3:
            guess = (left + above[x]) // 2
        else:
            p = left + above[x] - corner
            guess = min((left, above[x], corner), key=lambda value: abs(p - value))
        line[x] = (line[x] + guess) & 255
