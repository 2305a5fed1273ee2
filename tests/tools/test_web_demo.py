"""tools/web_demo.py: the page shows what `Predictor` finds, and a real browser can use it."""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from models import build_model
from predictor import Predictor
from tests.tiny import draw, tiny_args
from tools import web_demo
from util.checkpoints.checkpoint import save_checkpoint
from util.errors import UserError
from util.settings import FINETUNE

OPTIONS = {"device": "cpu", "image_size": 64}
BROWSER = Path("/usr/bin/chromium")
BROWSER_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Detectors with random weights (boxes.pth, masks.pth), an image, and a file that is none."""
    root = tmp_path_factory.mktemp("web")
    for name, flags in (("boxes.pth", ()), ("masks.pth", ("--masks",))):
        torch.manual_seed(0)
        state = build_model(tiny_args(FINETUNE, "--num_classes", "91", *flags))[0].state_dict()
        (head,) = (key for key in state if key.endswith("class_embed.weight"))
        state[head].normal_()  # scores that differ
        save_checkpoint({"model": state}, root / name)
    Image.fromarray(draw(0, 120, 160)[0]).save(root / "photo.png")
    (root / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def detectors(data: Path) -> web_demo.Detectors:
    sources = [str(data / name) for name in ("boxes.pth", "masks.pth", "missing.pth")]
    return web_demo.Detectors(sources, **OPTIONS)


@pytest.fixture(autouse=True)
def _all_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights give low scores."""
    monkeypatch.setattr(web_demo, "LOWEST_SCORE", 0.0)


def middle_score(found: web_demo.Found) -> float:
    scores = found.prediction.scores
    return float((scores[4] + scores[5]) / 2)


def test_results_are_those_of_the_predictor(detectors: web_demo.Detectors, data: Path) -> None:
    found = detectors.detect(str(data / "photo.png"), detectors.sources[0])
    predictor = Predictor.from_checkpoint(data / "boxes.pth", **OPTIONS)
    expected = predictor(data / "photo.png", threshold=0.0)
    assert torch.equal(found.prediction.boxes, expected.boxes)
    assert torch.equal(found.prediction.scores, expected.scores)
    assert found.rows(0.0) == [
        {"file_name": "photo.png", **row} for row in expected.to_coco(image_id=1)
    ]
    table = web_demo.table_rows(found.prediction)
    assert len(table) == len(expected) == 20
    assert [row[0] for row in table] == expected.names
    assert torch.allclose(torch.tensor([row[2:] for row in table]), expected.boxes, atol=0.051)


def test_threshold_and_kind_filter_what_is_drawn(detectors: web_demo.Detectors, data: Path) -> None:
    found = detectors.detect(str(data / "photo.png"), detectors.sources[1])
    assert found.prediction.rles is not None
    threshold = middle_score(found)
    with mock.patch.object(Predictor, "predict_batch", side_effect=AssertionError("network ran")):
        assert len(found.rows(threshold)) == 5
        boxes = found.draw(threshold, web_demo.BOXES)
        masks = found.draw(threshold, web_demo.MASKS)
        nothing = found.draw(1.0, web_demo.MASKS)
    assert (nothing == found.pixels).all()
    assert (boxes != found.pixels).any()
    assert (masks != boxes).any()
    assert web_demo.summary(found.prediction, threshold).startswith("5 objects in 160 x 120 pixels")
    best = f"The best score is {found.prediction.best_score:.2f}"
    assert best in web_demo.summary(found.prediction, 1.0)


def test_bad_image_and_checkpoint_are_named(detectors: web_demo.Detectors, data: Path) -> None:
    with pytest.raises(UserError, match=r"broken\.png") as error:
        detectors.detect(str(data / "broken.png"), detectors.sources[0])
    assert str(data) not in str(error.value), "a temporary folder says nothing to the reader"
    with pytest.raises(UserError, match=r"missing\.pth"):
        detectors.detect(str(data / "photo.png"), detectors.sources[2])


def test_port_in_use_names_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: [\w ]+; try --port \d+$"):
            web_demo.check_address("127.0.0.1", port)
    web_demo.check_address("127.0.0.1", port)
    with pytest.raises(UserError, match="between 1 and 65535"):
        web_demo.check_address("127.0.0.1", 70000)


def test_examples(data: Path, tmp_path: Path) -> None:
    for i in range(web_demo.MAX_EXAMPLES + 1):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i:02d}.png")
    paths = web_demo.example_images(str(tmp_path))
    assert paths == [str(tmp_path / f"{i:02d}.png") for i in range(web_demo.MAX_EXAMPLES)]
    with pytest.raises(UserError, match="nowhere"):
        web_demo.example_images(str(tmp_path / "nowhere"))


def test_without_gradio_a_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs gradio: pip install -r requirements-web\.txt"):
        web_demo.import_gradio()


def test_short_names_stay_apart() -> None:
    assert web_demo.short_names(["/runs/a/best.pth", "/runs/b/best.pth", "detr_resnet50"]) == [
        ("a/best.pth", "/runs/a/best.pth"),
        ("b/best.pth", "/runs/b/best.pth"),
        ("detr_resnet50", "detr_resnet50"),
    ]
    same = ["/x/a/best.pth", "/y/a/best.pth"]
    assert web_demo.short_names(same) == list(zip(same, same, strict=True))


# ---------------------------------------------------------------------------------------------------- with Gradio


def functions_of(page: Any) -> dict[str, Callable[..., list]]:
    return {function.name: function.fn for function in page.fns.values()}


def test_page_shows_results_and_errors(
    detectors: web_demo.Detectors, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed (requirements-web.txt)")
    page = web_demo.build_page(detectors, [str(data / "photo.png")], tmp_path)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    detect, show = (functions_of(page)[name] for name in ("detect", "show"))

    photo = str(data / "photo.png")
    found, kind, picture, message, table, download = detect(
        photo, detectors.sources[1], 0.0, web_demo.MASKS
    )
    assert kind["visible"]
    assert (picture == found.draw(0.0, web_demo.MASKS)).all()
    assert message.startswith("20 objects")
    assert len(table) == 20
    assert json.loads(Path(download["value"]).read_text()) == found.rows(0.0)
    assert not detect(photo, detectors.sources[0], 0.0, web_demo.MASKS)[1]["visible"], "no masks"

    threshold = middle_score(found)
    _, message, table, download = show(found, threshold, web_demo.BOXES)
    assert message.startswith("5 objects")
    assert table == web_demo.table_rows(found.prediction.above(threshold))
    assert json.loads(Path(download["value"]).read_text()) == found.rows(threshold)

    for path, source, word in (
        (data / "broken.png", detectors.sources[0], "broken.png"),
        (data / "photo.png", detectors.sources[2], "missing.pth"),
    ):
        found, _, picture, message, table, download = detect(str(path), source, 0.5, web_demo.BOXES)
        assert found is picture is download["value"] is None
        assert table == []
        assert word in message
        assert 'class="error"' in message
    assert detect(None, detectors.sources[0], 0.5, web_demo.BOXES)[3] == "", "the image was removed"


@pytest.fixture
def address(detectors: web_demo.Detectors, tmp_path: Path) -> Iterator[str]:
    """The address of a page that is served."""
    pytest.importorskip("gradio", reason="Gradio is not installed (requirements-web.txt)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with mock.patch.dict(os.environ, {"GRADIO_TEMP_DIR": str(tmp_path)}):
        page = web_demo.build_page(detectors, [], tmp_path, threshold=0.0)
        yield web_demo.launch(page, "127.0.0.1", port)
        page.close()


@pytest.mark.slow
def test_in_a_browser(
    address: str, detectors: web_demo.Detectors, data: Path, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER.exists():
        pytest.skip(f"no browser: {BROWSER} is missing")
    found = detectors.detect(str(data / "photo.png"), detectors.sources[0])
    threshold = round(middle_score(found), 2)
    count = len(found.prediction.above(threshold))

    expect, requests = sync_api.expect, []
    expect.set_options(timeout=60000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(BROWSER), args=BROWSER_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.on("request", lambda request: requests.append(request.url))
        page.set_default_timeout(60000)
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(str(data / "photo.png"))
        message = page.locator("#message")
        expect(message).to_contain_text("20 objects in 160 x 120 pixels")
        picture = page.locator("#picture img")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [160, 120]
        best = web_demo.table_rows(found.prediction)[0]
        row = page.get_by_role("row").nth(1)
        expect(row).to_contain_text(str(best[0]))
        expect(row).to_contain_text(str(best[1]))

        page.get_by_label("number input for Threshold").fill(str(threshold))
        page.keyboard.press("Tab")
        expect(message).to_contain_text(f"{count} object")
        with page.expect_download() as download:
            page.get_by_text("Download results as JSON").click()
        assert download.value.suggested_filename == "photo.json"
        assert len(json.loads(Path(download.value.path()).read_text())) == count

        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        page.locator("input[type=file]").first.set_input_files(str(data / "broken.png"))
        expect(message).to_contain_text("broken.png")
        browser.close()
    assert requests
    assert all(url.startswith((address, "data:", "blob:")) for url in requests), requests
