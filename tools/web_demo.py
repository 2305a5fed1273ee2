"""A web page on this computer: drop an image, see what a trained detector finds in it.

    python tools/web_demo.py --checkpoint outputs/custom/checkpoint_best.pth

The page shows boxes or masks, a table, and the results as JSON. It needs Gradio (requirements-web.txt), loads nothing
from other sites and sends nothing to them.
"""

import html
import json
import os
import signal
import socket
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.images.image_folder import ImageFolder
from predictor import Prediction, Predictor, to_uint8_tensor
from tools.demo.scenes import photo_paths
from tools.predict import HELP, draw_objects, score_value
from util.errors import UserError
from util.files import write_text
from util.logger import log
from util.runs.session import run_script
from util.settings import FINETUNE, Parser, add_flags

LOWEST_SCORE = (
    0.05  # the slider's minimum; objects below it are not computed, which saves their masks
)
MAX_EXAMPLES = 12
COLUMNS = ["class", "score", "x0", "y0", "x1", "y1"]
BOXES, MASKS = "boxes", "masks"
FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "sans-serif",
]  # of the system: nothing is fetched
CSS = """
.gradio-container {width: 100% !important; max-width: 1280px !important; margin: 0 auto !important}
#message {padding: 2px 4px; font-size: 1.05em}
#message .error {color: #b42318; font-weight: 600}
.dark #message .error {color: #fda29b}
"""


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/web_demo.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="PATH|URL|NAME",
        help="trained detectors to choose from, ours or published ones, or names of published models such as "
        "detr_resnet50 (hubconf.py lists them); the first is loaded at the start",
    )
    parser.add_argument(
        "--examples",
        metavar="DIR|FILE|LIST",
        help=f"images to pick from, the first {MAX_EXAMPLES} (default: scikit-image's sample images, if it is "
        "installed)",
    )
    parser.add_argument(
        "--threshold",
        type=score_value,
        default=0.5,
        metavar="SCORE",
        help="lowest score of an object when the page opens, from 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: everyone who reaches this computer can use the page (default: "
        "127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    add_flags(parser, FINETUNE, ("device", "image_size", "max_size", "amp", "compile", "exif"))
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------- detection


@dataclass
class Found:
    """What a detector found in an image.

    Attributes:
        file_name: of the image.
        pixels: uint8 [H, W, 3].
        prediction: the objects with a score of at least `LOWEST_SCORE`.
    """

    file_name: str
    pixels: np.ndarray
    prediction: Prediction

    def rows(self, threshold: float) -> list[dict[str, Any]]:
        """Return the entries of predictions.json, see docs/outputs.md."""
        found = self.prediction.above(threshold).to_coco(1)
        return [{"file_name": self.file_name, **row} for row in found]

    def draw(self, threshold: float, kind: str) -> np.ndarray:
        """Draw the objects above a threshold on the image, uint8 [H, W, 3]. kind: `BOXES` or `MASKS`."""
        objects = self.prediction.above(threshold)
        if kind == BOXES:
            objects = replace(objects, rles=None)
        return draw_objects(self.pixels, objects)


class Detectors:
    """The detectors of the page. Each is loaded when it is first used, and stays in memory.

    sources: what `Predictor.from_checkpoint` takes. options: its other arguments.
    """

    def __init__(self, sources: list[str], **options: Any) -> None:
        self.sources, self.options = sources, options
        self._loaded: dict[str, Predictor] = {}

    def load(self, source: str) -> Predictor:
        """Return a detector.

        Raises:
            UserError: the checkpoint can't be loaded.
        """
        if source not in self._loaded:
            self._loaded[source] = Predictor.from_checkpoint(source, **self.options)
        return self._loaded[source]

    def detect(self, path: str, source: str) -> Found:
        """Run a detector on an image.

        Raises:
            UserError: the image or the checkpoint can't be read.
        """
        predictor, name = self.load(source), Path(path).name
        try:
            image = to_uint8_tensor(path, predictor.exif)  # uint8 [3, H, W]
        except UserError as error:
            # The upload has a temporary folder, which says nothing to the reader of the page.
            raise UserError(str(error).replace(path, name)) from error
        prediction = predictor(image, threshold=LOWEST_SCORE)
        return Found(name, image.permute(1, 2, 0).numpy(), prediction)


def table_rows(prediction: Prediction) -> list[list[Any]]:
    """Return a row for each object, with the columns of `COLUMNS`; corners in pixels."""
    return [
        [name, round(score, 3), *(round(side, 1) for side in box)]
        for name, score, box in zip(
            prediction.names, prediction.scores.tolist(), prediction.boxes.tolist(), strict=True
        )
    ]


def summary(prediction: Prediction, threshold: float) -> str:
    """Return one line about the objects above a threshold."""
    objects = prediction.above(threshold)
    if not len(objects):
        return (
            f"No object has a score of {threshold:g} or more. The best score is {prediction.best_score:.2f}: "
            "lower the threshold to see more."
        )
    classes = ", ".join(f"{name} {count}" for name, count in Counter(objects.names).most_common())
    plural = "s" if len(objects) > 1 else ""
    height, width = prediction.size_hw
    return f"{len(objects)} object{plural} in {width} x {height} pixels: {classes}"


def short_names(sources: list[str]) -> list[tuple[str, str]]:
    """Return (name to show, source) of checkpoints: file and folder, or the whole path where two would be equal."""
    names = ["/".join(Path(source).parts[-2:]) for source in sources]
    repeated = len(set(names)) < len(set(sources))
    return list(zip(sources if repeated else names, sources, strict=True))


# ---------------------------------------------------------------------------------------------------------------- page


def import_gradio() -> ModuleType:
    """Import Gradio without its usage statistics.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"the page needs {error.name}: pip install -r requirements-web.txt"
        ) from error
    return gradio


class _Handlers:
    """What the page does when the reader changes something.

    folder: where the results for the download button are written.
    """

    def __init__(self, gr: ModuleType, detectors: Detectors, folder: Path) -> None:
        self.gr, self.detectors, self.folder = gr, detectors, folder

    def detect(self, path: str | None, source: str, threshold: float, kind: str) -> list[Any]:
        """Run the network. Returns the found objects, the update of the choice of `kind`, and what `show` returns."""
        hidden = self.gr.update(visible=False)
        if path is None:
            return [None, hidden, *self.show(None, threshold, kind)]
        try:
            found = self.detectors.detect(path, source)
        except (UserError, torch.OutOfMemoryError) as error:
            return [None, hidden, *self.show(None, threshold, kind, str(error))]
        has_masks = found.prediction.rles is not None
        return [found, self.gr.update(visible=has_masks), *self.show(found, threshold, kind)]

    def show(self, found: Found | None, threshold: float, kind: str, error: str = "") -> list[Any]:
        """Return the values of `_Results`: the objects above the threshold. The network does not run."""
        if found is None:
            problem = f'<span class="error">{html.escape(error)}</span>' if error else ""
            return [None, problem, [], self.gr.update(value=None, interactive=False)]
        # Each result has its own folder: the page of another reader may be downloading its own.
        path = Path(tempfile.mkdtemp(dir=self.folder)) / f"{Path(found.file_name).stem}.json"
        write_text(path, json.dumps(found.rows(threshold), indent=1))
        objects = found.prediction.above(threshold)
        return [
            found.draw(threshold, kind),
            html.escape(summary(found.prediction, threshold)),
            table_rows(objects),
            self.gr.update(value=str(path), interactive=True),
        ]


class _Inputs(NamedTuple):
    """The left column: what the reader chooses."""

    image: Any
    source: Any
    threshold: Any
    kind: Any


class _Results(NamedTuple):
    """The right column: what was found."""

    picture: Any
    message: Any
    table: Any
    download: Any


def _add_inputs(
    gr: ModuleType, sources: list[str], examples: list[str], threshold: float
) -> _Inputs:
    image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=300)
    # Gradio's own `preprocess` opens the image, and its message for a bad one names no file.
    image.preprocess = lambda payload: payload and payload.path
    source = gr.Dropdown(short_names(sources), value=sources[0], label="Checkpoint")
    slider = gr.Slider(LOWEST_SCORE, 1, max(threshold, LOWEST_SCORE), step=0.01, label="Threshold")
    kind = gr.Radio([BOXES, MASKS], value=MASKS, label="Show", visible=False)
    if examples:
        gr.Examples(examples, image, label="Examples")
    return _Inputs(image, source, slider, kind)


def _add_results(gr: ModuleType) -> _Results:
    picture = gr.Image(
        label="Objects", interactive=False, buttons=["fullscreen"], height=420, elem_id="picture"
    )
    message = gr.HTML(elem_id="message")
    table = gr.Dataframe(
        headers=COLUMNS, label="Objects, best first", interactive=False, max_height=320
    )
    download = gr.DownloadButton("Download results as JSON", interactive=False)
    return _Results(picture, message, table, download)


def _connect(
    gr: ModuleType, inputs: _Inputs, found: Any, results: _Results, handlers: _Handlers
) -> None:
    """Run the network for a new image or checkpoint; show the found objects again for the other choices."""
    gr.on(
        [inputs.image.change, inputs.source.change],
        handlers.detect,
        [*inputs],
        [found, inputs.kind, *results],
        api_name="detect",
    )
    gr.on(
        [inputs.threshold.change, inputs.kind.change],
        handlers.show,
        [found, inputs.threshold, inputs.kind],
        [*results],
        trigger_mode="always_last",
        show_progress="hidden",
        api_name=False,
    )


def build_page(
    detectors: Detectors, examples: list[str], folder: Path, threshold: float = 0.5
) -> Any:
    """Return the page, a `gradio.Blocks`.

    Args:
        examples: paths of images to pick from.
        folder: where the results for the download button are written.
        threshold: what the slider shows at first.
    """
    gr = import_gradio()
    with gr.Blocks(title="PreDETR", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# PreDETR\nDrop an image, and see what the detector finds.")
        found = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2):
                inputs = _add_inputs(gr, detectors.sources, examples, threshold)
            with gr.Column(scale=3):
                results = _add_results(gr)
        _connect(gr, inputs, found, results, _Handlers(gr, detectors, folder))
    return page


def example_images(source: str | None) -> list[str]:
    """Return paths of images to pick from: those of `--examples`, or scikit-image's sample images.

    Raises:
        UserError: `--examples` has no images, or they are in tar files.
    """
    if source is not None:
        images = ImageFolder(source)
        paths = [images.path(i) for i in range(min(len(images), MAX_EXAMPLES))]
        if not all(map(os.path.isfile, paths)):
            raise UserError(f"--examples {source}: give image files, not tar files")
        return paths
    try:
        photos = {path.name: str(path) for group in ("train", "val") for path in photo_paths(group)}
    except UserError:
        return []  # scikit-image is not installed
    return [photos[name] for name in ("chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg")]


def check_address(host: str, port: int) -> None:
    """Check that nothing else listens on the port.

    Raises:
        UserError: the port is in use, or it is none of this computer.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: a port is between 1 and 65535")
    try:
        with socket.create_server((host, port)):
            return
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # without the address, which follows
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    raise UserError(f"can't listen on --host {host} --port {port}: {reason}; try --port {free}")


def launch(page: Any, host: str, port: int) -> str:
    """Serve the page in a thread, and return its address. `page.close()` ends it."""
    gr = import_gradio()
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Soft(
            primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"]
        ),
    )
    return address


def main(args: Namespace) -> None:
    import_gradio()
    check_address(args.host, args.port)
    examples = example_images(args.examples)
    names = ("device", "amp", "compile", "image_size", "max_size", "exif")
    detectors = Detectors(args.checkpoint, **{name: getattr(args, name) for name in names})
    detectors.load(args.checkpoint[0])  # a wrong file is reported before the page opens

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the page as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="predetr-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads are removed with it
        page = build_page(detectors, examples, Path(folder), args.threshold)
        log.info("open %s in a browser; Ctrl-C ends the page", launch(page, args.host, args.port))
        page.block_thread()


if __name__ == "__main__":
    run_script(main, parse)
