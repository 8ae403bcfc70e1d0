"""Paints the picture at the head of the README: each adapter of the small model, at strengths from 0 to 1.

python -m extensions_builtin_shim.tiny_sd.grid
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .checkpoint import CHECKPOINT, load_trained
from .evaluate import STRENGTHS, asked, with_adapters
from .model import TinySD
from .models.make_adapters import FOLDER
from .recipes import RECIPES
from .sampler import to_image
from .shapes import SIZE
from .train import threads

OUT = Path(__file__).resolve().parents[2] / "docs" / "images" / "grid.png"
SCALE, GAP, TOP, LEFT = 3, 6, 34, 150
INK, QUIET, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)
SHOWN = {"outline": 5, "stripes": 7, "checker": 2, "glow": 6, "frame": 6, "dots": 5, "tilt": 0, "moon": 0}
"""Which of the probes stands in each adapter's row."""


def painted(model: TinySD, folder: Path) -> dict[str, list[Image.Image]]:
    """For each adapter, its row of pictures; all of one seed."""
    rows = {}
    for style, index in SHOWN.items():
        scene, path = asked(style)[index : index + 1], folder / f"{style}.safetensors"
        pictures = [with_adapters(model, [(path, strength)], scene, 1000 + index) for strength in STRENGTHS]
        rows[style] = [to_image(picture) for picture in pictures]
    return rows


def lay_out(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """The labelled grid."""
    cell = SIZE * SCALE
    width, height = LEFT + len(STRENGTHS) * (cell + GAP), TOP + len(rows) * (cell + GAP)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(16), ImageFont.load_default(12)
    pen.text((12, TOP // 2), "strength", QUIET, small, anchor="lm")
    for column, strength in enumerate(STRENGTHS):
        middle = LEFT + column * (cell + GAP) + cell // 2
        pen.text((middle, TOP // 2), f"{strength:g}", INK, large, anchor="mm")
    for row, (style, pictures) in enumerate(rows.items()):
        y = TOP + row * (cell + GAP)
        pen.text((12, y + cell // 2 - 10), style, INK, large, anchor="lm")
        pen.text((12, y + cell // 2 + 12), RECIPES[style].family, QUIET, small, anchor="lm")
        for column, picture in enumerate(pictures):
            place = (LEFT + column * (cell + GAP), y)
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), place)
    return sheet


def preview(model: TinySD, style: str, folder: Path) -> Image.Image:
    """The card's picture of an adapter, 128 × 128: four of the probes at strength 1."""
    scenes = [asked(style)[index] for index in (4, 7, 2, 6)]
    pictures = with_adapters(model, [(folder / f"{style}.safetensors", 1.0)], scenes)
    sheet = Image.new("RGB", (2 * SIZE, 2 * SIZE))
    for index, picture in enumerate(pictures):
        sheet.paste(to_image(picture), (index % 2 * SIZE, index // 2 * SIZE))
    return sheet.resize((4 * SIZE, 4 * SIZE), Image.Resampling.NEAREST)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Paints the grid of strengths and the cards' previews.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--lora-dir", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    with threads(1):
        model = load_trained(given.checkpoint)
        for style in SHOWN:
            preview(model, style, given.lora_dir).save(given.lora_dir / f"{style}.png", optimize=True)
        sheet = lay_out(painted(model, given.lora_dir))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(given.out, optimize=True)


if __name__ == "__main__":
    main()
