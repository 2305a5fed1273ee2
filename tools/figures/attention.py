"""Attention maps: encoder self-attention at points, and decoder attention of the detected objects.

As figures 3 and 6 of DETR (Carion et al. 2020), for DETR and Conditional DETR.
"""

from argparse import Namespace
from dataclasses import dataclass

import numpy as np

from models.attention_maps import ImageAttention
from predictor import Prediction, Predictor
from tools.figures.common import (
    add_checkpoint_flag,
    add_image_flags,
    add_threshold_flag,
    load_predictor,
    open_images,
    picture_files,
    pixel_points,
    read_pictures,
    to_array,
)
from util.errors import UserError
from util.logger import log
from util.plots.attention import draw_colored_maps, draw_heat, draw_numbered_points, fit_image
from util.plots.boxes import Color, cycle_colors, draw_boxes
from util.plots.fonts import class_text
from util.plots.pages import panel_page
from util.settings import Parser

COUNT = 4
MAX_OBJECTS, MAX_POINTS = 8, 4
PANELS_PER_LINE = 4
SIDE = 300  # longest side of a panel, in pixels


def add_flags(parser: Parser) -> None:
    add_checkpoint_flag(parser)
    add_image_flags(parser, COUNT)
    add_threshold_flag(parser)
    add_layer_flag(parser)
    parser.add_argument(
        "--head",
        type=int,
        metavar="N",
        help="attention head, from 0 (default: the mean of all)",
    )


def add_layer_flag(parser: Parser) -> None:
    """Add `--points` and `--layer`."""
    parser.add_argument(
        "--points",
        type=float,
        nargs="+",
        metavar="PIXEL",
        help="points whose encoder attention is drawn, two values x y in pixels for each (default: centers of objects)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        metavar="N",
        help="layer of encoder and decoder, from 0; negative numbers count from the last (default: -1)",
    )


@dataclass
class Scene:
    """What is drawn of one image, scaled for display.

    Attributes:
        image: uint8 [h, w, 3].
        factor: pixels of `image` per pixel of the original.
        objects: the objects to draw, best first.
        attention: of the detector, in pixels of the original.
        points: (x, y) in pixels of the original.
    """

    image: np.ndarray
    factor: float
    objects: Prediction
    attention: ImageAttention
    points: list[tuple[float, float]]

    @property
    def colors(self) -> list[Color]:
        """A color of each object."""
        return cycle_colors(len(self.objects))

    def titles(self) -> list[str]:
        """Return "class score" of each object."""
        rows = zip(
            self.objects.names, self.objects.category_ids, self.objects.scores.tolist(), strict=True
        )
        return [f"{class_text(name, number)} {score:.2f}" for name, number, score in rows]

    def with_boxes(self, image: np.ndarray) -> np.ndarray:
        """Draw the boxes of the objects on a picture of the size of `image`."""
        boxes = self.objects.boxes * self.factor
        return draw_boxes(image, boxes, self.titles(), None, self.colors)

    def with_box(self, image: np.ndarray, number: int) -> np.ndarray:
        """Draw the box of one object."""
        box = self.objects.boxes[number : number + 1] * self.factor
        return draw_boxes(image, box, None, None, [self.colors[number]])

    def with_points(self, image: np.ndarray, number: int | None = None) -> np.ndarray:
        """Draw all points with their numbers, or one of them."""
        numbers = range(len(self.points)) if number is None else [number]
        scaled = np.array([self.points[i] for i in numbers]).reshape(-1, 2) * self.factor
        colors = cycle_colors(len(self.points))
        return draw_numbered_points(
            image, scaled, [i + 1 for i in numbers], [colors[i] for i in numbers]
        )


def look(
    predictor: Predictor, picture, args: Namespace, points: list[tuple[float, float]] | None
) -> Scene:
    """Detect the objects of an image and record the attention of `--layer`.

    Raises:
        UserError: a point is outside of the image.
    """
    height, width = picture.image.shape[-2:]
    for x, y in points or []:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"--points {x:g} {y:g} is outside of {picture.name}, which has {width} x {height} pixels"
            )
    found, attention = predictor.attention(picture.image, threshold=0.0, layers=[args.layer])
    objects, limit = found.above(args.threshold), MAX_OBJECTS
    if not len(objects):
        log.warning(
            "%s: no object has a score of %g, the best has %.2f: the best three are drawn; lower --threshold",
            picture.name,
            args.threshold,
            found.best_score,
        )
        objects, limit = found, 3
    objects = objects.best(limit)
    image, factor = fit_image(to_array(picture.image), SIDE)
    return Scene(image, factor, objects, attention, points or _centers(objects))


def _centers(objects: Prediction) -> list[tuple[float, float]]:
    """Return the centers of the best objects' boxes, and the center of the image if there is none."""
    centers = (objects.boxes[:, :2] + objects.boxes[:, 2:]) / 2  # [K, 2]
    height, width = objects.size_hw
    inside = centers.clamp(max=max(height, width))[:MAX_POINTS].tolist()
    points = [(min(x, width - 1), min(y, height - 1)) for x, y in inside]
    return points or [(width / 2, height / 2)]


def panels(scene: Scene, args: Namespace) -> list[list[tuple[str, np.ndarray]]]:
    """Return (title, picture) of the overview, the encoder's panels and the decoder's."""
    seen, layer, head = scene.attention, args.layer, args.head
    objects, numbers = scene.objects, range(len(scene.objects))
    maps = [seen.decoder_map(int(objects.queries[i]), layer, head) for i in numbers]
    overview = [
        ("objects and points", scene.with_points(scene.with_boxes(scene.image))),
        ("decoder attention of all objects", draw_colored_maps(scene.image, maps, scene.colors)),
    ]
    encoder = [
        (
            f"encoder, from point {i + 1} ({x:.0f}, {y:.0f})",
            scene.with_points(draw_heat(scene.image, seen.encoder_map(x, y, layer, head)), i),
        )
        for i, (x, y) in enumerate(scene.points)
    ]
    decoder = [
        (f"decoder, {title}", scene.with_box(draw_heat(scene.image, weights), i))
        for i, (title, weights) in enumerate(zip(scene.titles(), maps, strict=True))
    ]
    return [overview, encoder, decoder]


def write(groups: list[list[tuple[str, np.ndarray]]], path) -> None:
    """Write a page: a line for each group of panels, in several lines if it has many."""
    nothing = {"boxes": np.zeros((0, 4)), "labels": None}
    lines = [
        [(title, picture, nothing) for title, picture in group[start : start + PANELS_PER_LINE]]
        for group in groups
        for start in range(0, len(group), PANELS_PER_LINE)
    ]
    panel_page(lines, path)


def check_attention(predictor: Predictor, args: Namespace) -> None:
    """Check `--layer` and `--head` before the first image.

    Raises:
        UserError: the detector has no such layer or head.
    """
    heads = predictor.settings.nheads
    if getattr(args, "head", None) is not None and not 0 <= args.head < heads:
        raise UserError(f"--head {args.head}: this detector has {heads}; give 0 to {heads - 1}")
    layers = min(predictor.settings.enc_layers, predictor.settings.dec_layers)
    if not -layers <= args.layer < layers:
        raise UserError(
            f"--layer {args.layer}: encoder and decoder have {predictor.settings.enc_layers} and "
            f"{predictor.settings.dec_layers} layers; give 0 to {layers - 1}, or -1 for the last"
        )


def run(args: Namespace, make_panels=panels, prefix: str = "attention_") -> None:
    points, images = pixel_points(args.points), open_images(args)
    predictor = load_predictor(args)
    check_attention(predictor, args)
    paths = picture_files(images, args, prefix)
    for picture in read_pictures(images, paths, args):
        write(make_panels(look(predictor, picture, args, points), args), picture.path)
    log.info(
        "written to %s: %s", args.output_dir, paths[0].name + (", ..." if len(paths) > 1 else "")
    )
