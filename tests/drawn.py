"""What tests of pictures and of the report share: two specs, and what an SVG picture holds."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from attnplan import AttentionSpec, pictures
from attnplan import patterns as P

image = pytest.importorskip("PIL.Image")

LONGNET = AttentionSpec(
    seq_len=16_384, heads=12, head_dim=64, pattern=P.longnet([1024, 4096, 16_384], [1, 4, 16]), causal=True
)
MILLION = AttentionSpec(
    seq_len=1_000_000,
    heads=12,
    head_dim=64,
    pattern=P.longnet([2048 << i for i in range(10)], [1 << i for i in range(10)]),
    causal=True,
)
SVG = "{http://www.w3.org/2000/svg}"


def svg_of(figure):
    return pictures.inline_svg(figure, "x", "a picture")


def ids(svg):
    return [e.get("id", "") for e in ElementTree.fromstring(svg).iter()]


def words(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if e.text]


def pixels(svg):
    """Return the raster images of a picture, RGBA."""
    found = re.findall(r'xlink:href="data:image/png;base64,([^"]+)"', svg)
    return [np.array(image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")) for data in found]
