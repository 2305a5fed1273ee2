"""Reference points and sampling locations of Deformable DETR, in its encoder at points and in its decoder.

As figure 6 of Deformable DETR (Zhu et al. 2021): bright and large points have a high attention weight, the cross is the
reference point. The points of all heads and feature levels are drawn together.
"""

from argparse import Namespace

import numpy as np

from models.attention_maps import Samples
from tools.figures import attention
from tools.figures.attention import Scene
from tools.figures.common import add_checkpoint_flag, add_image_flags, add_threshold_flag
from util.plots.attention import draw_samples
from util.settings import Parser


def add_flags(parser: Parser) -> None:
    add_checkpoint_flag(parser)
    add_image_flags(parser, attention.COUNT)
    add_threshold_flag(parser)
    attention.add_layer_flag(parser)


def draw(scene: Scene, samples: Samples) -> np.ndarray:
    """Draw what one query samples, on the image."""
    return draw_samples(
        scene.image,
        samples.points_xy.flatten(0, 2) * scene.factor,  # [H * L * P, 2]
        samples.weights.flatten(),
        samples.reference_xy[0, :2] * scene.factor,
    )


def panels(scene: Scene, args: Namespace) -> list[list[tuple[str, np.ndarray]]]:
    """Return (title, picture) of the overview, the encoder's panels and the decoder's."""
    seen, layer = scene.attention, args.layer
    overview = [("objects and points", scene.with_points(scene.with_boxes(scene.image)))]
    encoder = [
        (
            f"encoder, at point {i + 1} ({x:.0f}, {y:.0f})",
            draw(scene, seen.encoder_samples(x, y, layer)),
        )
        for i, (x, y) in enumerate(scene.points)
    ]
    queries = scene.objects.queries.tolist()
    decoder = [
        (
            f"decoder, {title}",
            scene.with_box(draw(scene, seen.decoder_samples(query, layer)), i),
        )
        for i, (title, query) in enumerate(zip(scene.titles(), queries, strict=True))
    ]
    return [overview, encoder, decoder]


def run(args: Namespace) -> None:
    attention.run(args, panels, "sampling_")
