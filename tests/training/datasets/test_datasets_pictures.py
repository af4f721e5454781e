"""Pictures and lists of texts as sources hold them, how they are kept, and their edges."""

import csv
import io
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pyarrow
import pytest
from comparing import assert_alike, pixels
from PIL import Image, ImageOps
from pyarrow import parquet
from scipy.ndimage import label, maximum
from sources import (
    jpeg,
    photograph,
)
from training.datasets.sample import decode_picture, picture_size
from training.datasets.sources.files import kept, pictures_in, texts_in
from training.datasets.targets.canny import edge_map


def test_pictures_are_shrunk_to_a_short_side_and_never_enlarged():
    coffee = jpeg(photograph("coffee"))  # 600 by 400
    assert decode_picture(kept(coffee, 256)).size == (384, 256)
    assert_alike(
        pixels(kept(coffee, 256)), np.asarray(photograph("coffee").resize((384, 256), Image.Resampling.LANCZOS))
    )
    assert kept(coffee, 0) is coffee and kept(coffee, 400) is coffee
    png = io.BytesIO()
    photograph("coffee").save(png, "PNG")
    assert kept(png.getvalue(), 0) == png.getvalue()
    assert kept(png.getvalue(), 1000).startswith(b"\xff\xd8\xff"), "what is not a JPEG becomes one"


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet"])
def test_lists_of_prompts_in_every_format(tmp_path, ending):
    texts, path = ["a mill, at noon", "zwei Tänzer"], tmp_path / f"art.{ending}"
    if ending == "txt":
        path.write_text("\n".join(["", *texts, " "]), encoding="utf-8")
    elif ending == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["id", "prompt"], [1, texts[0]], [2, texts[1]], [3, ""]])
    elif ending == "jsonl":
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*texts, None]), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.table({"id": [1, 2, 3], "prompt": [*texts, None]}), path)
    assert texts_in(path) == texts


def edges_of(pixels: np.ndarray) -> np.ndarray:
    """The edge map of a square picture [S, S, 3], as booleans [S, S]."""
    edges = np.asarray(edge_map(Image.fromarray(pixels.astype(np.uint8)), len(pixels)))
    assert edges.shape == pixels.shape and set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all()
    return edges[..., 0] > 0


def gradient(pixels: np.ndarray) -> np.ndarray:
    """The L1 norm of the Sobel gradient [S, S] in the channel where it is largest, by hand."""
    padded = np.pad(pixels.astype(np.int64), ((1, 1), (1, 1), (0, 0)), "edge")
    across = padded[:, 2:] - padded[:, :-2]
    down = padded[2:] - padded[:-2]
    across = across[:-2] + 2 * across[1:-1] + across[2:]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return (abs(across) + abs(down)).max(-1)


def test_edges_are_white_lines_on_black_where_the_brightness_steps():
    step = np.full((64, 96, 3), 100, np.uint8)  # 96 wide: the middle square is columns 16 to 79
    step[:, 48:] = 160
    edges = np.asarray(edge_map(Image.fromarray(step), 64))[..., 0] > 0
    assert edges[1:-1, 31:33].any(1).all() and not edges[:, :31].any() and not edges[:, 33:].any()
    # A step of s in 0..255 has a Sobel gradient of 4s: from 51 on it is over the threshold of 200.
    edges_of(np.where(step == 160, 151, 100)[:, 16:80])
    with pytest.raises(ValueError, match="no edges"):
        edges_of(np.where(step == 160, 150, 100)[:, 16:80])


def test_edges_are_those_of_controlnets_canny():
    """In colour and by the L1 norm: a third of the cat's edges were there by grey and the L2 norm."""
    grey = np.zeros((64, 64, 3))  # of one brightness (60), in two colours
    grey[:, :32, 0], grey[:, 32:, 1] = 200, 102
    assert edges_of(grey)[1:-1, 30:34].any(1).all()
    down, across = np.indices((64, 64))
    diagonal = np.where((down > across)[..., None], 140, 100).repeat(3, 2)
    assert np.hypot(120, 120) < 200 < 120 + 120 == gradient(diagonal).max(), "over the threshold by L1 alone"
    assert edges_of(diagonal).sum() > 50
    photo = np.asarray(photograph("cat").resize((256, 256)))
    edges, strength = edges_of(photo), gradient(photo)
    assert strength[edges].min() > 100, "over the lower threshold everywhere"
    pieces, count = label(edges, structure=np.ones((3, 3)))
    assert count > 20 and maximum(strength, pieces, range(1, count + 1)).min() > 200, "each from a strong pixel on"
    assert 0.05 < edges.mean() < 0.3


def test_turned_and_transparent_pictures_are_made_upright_and_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    buffer = io.BytesIO()
    photograph("cat").rotate(90, expand=True).save(buffer, "JPEG", exif=exif, quality=95)
    assert_alike(pixels(kept(buffer.getvalue(), 128)), np.asarray(ImageOps.contain(photograph("cat"), (192, 128))), 6)
    seen = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    buffer = io.BytesIO()
    seen.save(buffer, "PNG")
    assert (pixels(kept(buffer.getvalue(), 512)) == 255).all()


def test_parquet_pictures_are_read_row_by_row(tmp_path):
    contents = [f"picture {n}".encode() for n in range(11)]
    table = pyarrow.table(
        {"image": [{"bytes": content, "path": None} for content in contents], "text": list("abcdefghijk")}
    )
    parquet.write_table(table, tmp_path / "some.parquet", row_group_size=3)
    found = list(pictures_in(tmp_path / "some.parquet"))
    assert [(place.read(), caption) for _, place, caption in reversed(found)] == list(
        zip(reversed(contents), "kjihgfedcba", strict=True)
    )


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
def test_pictures_of_every_type_of_bytes_are_found(tmp_path, kind):
    contents = [f"picture {n}, longer than a view holds itself".encode() for n in range(11)]
    table = pyarrow.table({"jpg": pyarrow.array(contents, getattr(pyarrow, kind)())})
    parquet.write_table(table, tmp_path / "bare.parquet", row_group_size=4)
    assert str(parquet.ParquetFile(tmp_path / "bare.parquet").schema_arrow.field("jpg").type) == kind
    assert [place.read() for _, place, _ in pictures_in(tmp_path / "bare.parquet")] == contents


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_captions_of_every_type_of_text_are_found(tmp_path, kind):
    words = ["a cat", "a boat", "a cat", None]
    texts = pyarrow.array(words)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pyarrow, kind)())
    numbers = pyarrow.array([1, 2, 1, 2]).dictionary_encode()  # no text
    table = pyarrow.table({"jpg": [b"x"] * 4, "caption": numbers, "text": texts})
    parquet.write_table(table, tmp_path / "some.parquet")
    assert parquet.ParquetFile(tmp_path / "some.parquet").schema_arrow.field("text").type == texts.type
    assert [caption for _, _, caption in pictures_in(tmp_path / "some.parquet")] == ["a cat", "a boat", "a cat", ""]
    assert texts_in(tmp_path / "some.parquet", "text") == words[:3]


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def bare_png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand: Pillow writes no 16-bit grey with alpha and no picture without pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["EPS", "TIFF", "GIF", "BMP", "PPM", "ICNS", "PDF", "DDS"])
def test_no_other_format_is_decoded(tmp_path, form):
    """Pillow hands an EPS, for one, to Ghostscript: code of a stranger's picture would run."""
    content = encoded(photograph("cat").resize((64, 64)), form)
    with pytest.raises(ValueError, match="it is no picture file in JPEG, PNG or WebP"):
        decode_picture(content)
    parquet.write_table(pyarrow.table({"jpg": [content], "caption": ["a cat"]}), tmp_path / "a.parquet")
    ((_, place, _),) = pictures_in(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no picture file in JPEG"):
        kept(place.read(), 64)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
def test_these_formats_are_decoded(form):
    """MPO is what some telephones and stereo cameras write: a JPEG with more pictures behind it."""
    assert_alike(pixels(encoded(photograph("cat"), form)), np.asarray(photograph("cat")), 12)


@pytest.mark.parametrize("side", [11_000, 20_000, 200_000])
def test_a_size_is_checked_before_there_are_pixels(side):
    content = bare_png(side, side, 1, 0, b"")
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than the 120 million pixels that are read"):
        decode_picture(content)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)], ids=["L", "LA", "RGB", "RGBA"])
def test_pictures_of_16_bits_keep_their_brightness(colour, channels):
    values = np.linspace(0, 65535, 64)
    row = np.repeat(values[:, None], channels, 1)
    if channels in (2, 4):
        row[:, -1] = 65535
    content = bare_png(64, 2, 16, colour, (b"\x00" + row.astype(">u2").tobytes()) * 2)
    read = np.asarray(decode_picture(content), np.float32)
    assert read.shape == (2, 64, 3) and np.abs(read - (values / 257)[None, :, None]).max() <= 1
    assert abs(read.mean() - 127.5) < 1


def test_the_size_is_read_from_the_header():
    assert picture_size(encoded(photograph("coffee"), "PNG")) == (600, 400)
    with pytest.raises(ValueError, match="no picture file"):
        picture_size(b"<html>")
