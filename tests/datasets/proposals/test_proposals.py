"""Proposal methods: selective search, EdgeBoxes, boxes from files, and the selection of boxes."""

import builtins
import json
import multiprocessing
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.proposals.edge_boxes as edge_boxes_module
from datasets.images.image_folder import ImageFolder
from datasets.proposals import (
    FixedNumProposals,
    SelectedProposals,
    build_proposals,
    pad_with_jittered_boxes,
    select_indices,
)
from datasets.proposals.cache import CachedProposals
from datasets.proposals.edge_boxes import EdgeBoxes
from datasets.proposals.from_file import read_npy
from datasets.proposals.selective_search import SelectiveSearch, rank_by_agreement
from datasets.sample import BadImageError
from tests.tiny import captured_log, proposal_settings, write_images
from util.box_ops import box_iou
from util.errors import UserError
from util.random_state import SampleRNG


@pytest.fixture
def cv2() -> types.ModuleType:
    return pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A photo, uint8 [100, 140, 3]."""
    data = pytest.importorskip(
        "skimage.data", reason="scikit-image, which has the image, is not installed"
    )
    return np.asarray(Image.fromarray(data.astronaut()).crop((0, 0, 420, 300)).resize((140, 100)))


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def propose_in_process(queue, method, image: np.ndarray, seed: int) -> None:
    queue.put(method(as_tensor(image), SampleRNG(seed)).numpy())


def as_set(boxes: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(box) for box in boxes.tolist()}


# Selective search


def test_published_setting_scales_boxes_from_128_pixels(cv2, photo: np.ndarray) -> None:
    method = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    resized = Image.fromarray(photo).resize((128, 128), Image.Resampling.BILINEAR)
    method.setBaseImage(np.asarray(resized))
    method.switchToSelectiveSearchFast()
    scale = np.array([140, 100, 140, 100], dtype=np.float32)
    raw = method.process().astype(np.float32) / 128 * scale
    expected = np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], 1)

    propose = build_proposals(proposal_settings(proposals="selective_search"))
    boxes = propose(as_tensor(photo), SampleRNG(0), "")
    assert len(boxes) == len(as_set(expected)) > 30
    assert as_set(boxes) == as_set(expected)


def test_full_resolution(cv2, photo: np.ndarray) -> None:
    full, resized = (
        build_proposals(proposal_settings(proposals="selective_search", ss_resize=side))
        for side in (0, 128)
    )
    boxes = full(as_tensor(photo), SampleRNG(0), "")
    assert torch.equal(boxes, boxes.round())
    assert [0, 0, 140, 100] in boxes.tolist()
    assert as_set(boxes) != as_set(resized(as_tensor(photo), SampleRNG(0), ""))


def test_ranked_boxes_agree_with_most_others() -> None:
    """Scores are sums of IoU - 0.5 over all boxes above it; near duplicates go, and the whole image comes last."""
    boxes = [
        [0, 0, 100, 100],  # the whole image
        [10, 10, 30, 30],
        [10, 10, 30, 31],
        [10, 10, 30, 27],
        [60, 60, 80, 80],
        [60, 60, 80, 95],
    ]
    kept, scores = rank_by_agreement(torch.tensor(boxes, dtype=torch.float32), 100 * 100)
    assert kept.tolist() == [1, 4, 5, 0]
    first = 0.5 + (20 / 21 - 0.5) + (17 / 20 - 0.5)
    pair = 0.5 + (20 / 35 - 0.5)
    assert scores.tolist() == pytest.approx([first, pair, pair, 0])


def test_ranked_selective_search_keeps_its_order(cv2, photo: np.ndarray) -> None:
    settings = {"proposals": "selective_search", "ss_rank": "agreement"}
    propose = build_proposals(proposal_settings(**settings))
    first, second = (propose(as_tensor(photo), SampleRNG(seed), "") for seed in (1, 2))
    assert torch.equal(first, second)
    shuffled = build_proposals(proposal_settings(proposals="selective_search"))
    everything = as_set(shuffled(as_tensor(photo), SampleRNG(0), ""))
    assert as_set(first) < everything
    iou = box_iou(first, first)[0].fill_diagonal_(0)
    assert iou.max() <= 0.6 + 1e-6
    with pytest.raises(UserError, match="--ss_rank agreement is not in the published code"):
        build_proposals(proposal_settings(**settings, reproduce_published=True))


def test_order_depends_on_the_sample_not_the_process(cv2, photo: np.ndarray) -> None:
    """OpenCV shuffles with C's rand, but boxes must be a function of (seed, epoch, index) in every worker."""
    method = SelectiveSearch()
    here = [method(as_tensor(photo), SampleRNG(seed)).numpy() for seed in (1, 1, 2)]
    assert np.array_equal(here[0], here[1])
    assert not np.array_equal(here[0], here[2])
    assert np.array_equal(np.unique(here[0], axis=0), np.unique(here[2], axis=0))
    queue = multiprocessing.get_context("fork").SimpleQueue()
    worker = multiprocessing.get_context("fork").Process(
        target=propose_in_process, args=(queue, method, photo, 2)
    )
    worker.start()
    assert np.array_equal(queue.get(), here[2])
    worker.join()


def test_published_order_is_that_of_opencv(cv2, photo: np.ndarray) -> None:
    """OpenCV puts small regions first. The sample seeds it, so that every worker gives the same boxes."""
    method = build_proposals(
        proposal_settings(proposals="selective_search", reproduce_published=True)
    )
    own = [method(as_tensor(photo), SampleRNG(seed)) for seed in range(12)]
    assert torch.equal(own[0], method(as_tensor(photo), SampleRNG(0)))
    assert not torch.equal(own[0], own[1])
    uniform = [SelectiveSearch()(as_tensor(photo), SampleRNG(seed)) for seed in range(12)]
    assert as_set(own[0]) == as_set(uniform[0])

    def mean_area(draws: list[torch.Tensor]) -> torch.Tensor:
        areas = [(boxes[:30, 2:] - boxes[:30, :2]).prod(1).mean() for boxes in draws]
        return torch.stack(areas).mean()

    assert mean_area(own) < 0.9 * mean_area(uniform)
    header = {"method": "selective_search", "settings": SelectiveSearch().settings}
    with pytest.raises(UserError, match="was made with order None, the flags say OpenCV's"):
        CachedProposals.check_origin("cache", header, method, "selective_search")


def test_tiny_and_thin_images(cv2) -> None:
    rng = np.random.RandomState(0)
    for height, width in ((1, 1), (2, 3), (5, 60)):
        image = rng.randint(0, 256, (height, width, 3), dtype=np.uint8)
        for method in (SelectiveSearch(), SelectiveSearch(0)):
            boxes = method(as_tensor(image), SampleRNG(0))
            assert len(boxes)
            assert bool((boxes[:, 2:] > boxes[:, :2]).all())
            assert bool((boxes[:, 2:] <= torch.tensor([width, height])).all())


def test_opencv_error_gives_a_bad_image(
    cv2, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args, **_flags) -> None:
        raise cv2.error("out of\nmemory")

    monkeypatch.setattr(
        cv2.ximgproc.segmentation,
        "createSelectiveSearchSegmentation",
        lambda: types.SimpleNamespace(setBaseImage=fail),
    )
    monkeypatch.setattr(cv2.ximgproc, "createEdgeBoxes", fail)
    for method in (SelectiveSearch(), EdgeBoxes()):
        with pytest.raises(BadImageError, match="OpenCV fails on this image .out of memory"):
            method(as_tensor(photo), SampleRNG(0))


# EdgeBoxes


def test_edge_boxes_equal_opencv_best_first(cv2, photo: np.ndarray) -> None:
    boxes, scores = EdgeBoxes().propose(photo)
    edges, orientation = edge_boxes_module.gradient_edges(photo.astype(np.float32) / 255)
    raw, raw_scores = cv2.ximgproc.createEdgeBoxes(
        alpha=0.65,
        beta=0.75,
        eta=1,
        minScore=0.01,
        maxBoxes=512,
        edgeMinMag=0.1,
        edgeMergeThr=0.5,
        clusterMinMag=0.5,
        maxAspectRatio=3,
        minBoxArea=1000,
        gamma=2,
        kappa=1.5,
    ).getBoundingBoxes(edges, orientation)
    assert len(boxes) > 5
    assert np.array_equal(boxes, np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], 1))
    assert np.array_equal(scores, raw_scores.ravel())
    assert (np.diff(scores) <= 0).all()
    drawn = [EdgeBoxes()(as_tensor(photo), SampleRNG(seed)) for seed in (1, 2)]
    assert torch.equal(*drawn), "ranked boxes keep their order"


def test_gradient_edges_are_thin_and_where_the_image_changes() -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    image = np.zeros((40, 60, 3), dtype=np.float32)
    image[:, 30:] = (0, 1, 0)
    edges, orientation = edge_boxes_module.gradient_edges(image)
    columns = np.unique(np.nonzero(edges > 0.1)[1])
    assert set(columns.tolist()) <= {29, 30}
    assert edges.max() == 1
    assert np.allclose(np.sin(orientation[5:35, 29:31]), 0, atol=1e-4), (
        "the normal of a vertical edge is horizontal"
    )


def test_without_boxes_the_image_is_sharpened_and_enlarged(
    cv2, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.full((100, 200, 3), 90, dtype=np.uint8)
    seen = []

    def boxes(_self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(pixels.shape)
        found = [[15, 29, 101, 55], [3, 3, 5, 200]] if len(seen) == 2 else []
        return np.array(found, dtype=np.int64).reshape(-1, 4), np.array(
            [0.5, 0.25][: len(found)], dtype=np.float32
        )

    monkeypatch.setattr(EdgeBoxes, "_boxes", boxes)
    found, scores = EdgeBoxes().propose(image)
    assert seen == [(100, 200, 3), (1000, 2000, 3)]
    assert found.tolist() == [[1, 2, 11, 7]], (
        "divided by 10, rounded down; a box without width is dropped"
    )
    assert scores.tolist() == [0.5]


def test_flat_image_gives_its_middle(cv2) -> None:
    for (height, width), expected in (
        ((90, 120), [30, 22, 90, 66]),
        ((1, 1), [0, 0, 1, 1]),
        ((5, 300), [75, 1, 225, 3]),
    ):
        boxes, scores = EdgeBoxes().propose(np.full((height, width, 3), 77, dtype=np.uint8))
        assert boxes.tolist() == [expected]
        assert scores.tolist() == [0]


def write_forest(path: Path) -> Path:
    """Write a forest in OpenCV's format with one tree of three nodes.

    If the gradient at the center of a patch is small, there is no edge; otherwise the middle column of the patch is an
    edge.
    """
    options = {
        "stride": 2,
        "shrinkNumber": 2,
        "patchSize": 32,
        "patchInnerSize": 16,
        "numberOfGradientOrientations": 4,
        "gradientSmoothingRadius": 0,
        "regFeatureSmoothingRadius": 2,
        "ssFeatureSmoothingRadius": 8,
        "gradientNormalizationRadius": 4,
        "selfsimilarityGridSize": 5,
        "numberOfTrees": 1,
        "numberOfTreesToEvaluate": 1,
    }
    gradient = 3 * 16 * 16 + 8 * 16 + 8  # color channels come first, each on 16 x 16 cells
    edge = [y * 16 + 8 for y in range(16)]
    arrays = {
        "childs": [2, 0, 0],
        "featureIds": [gradient, 0, 0],
        "thresholds": [0.05, 0.0, 0.0],
        "edgeBoundaries": [0, 0, 0, len(edge)],
        "edgeBins": edge,
    }
    lines = [
        "%YAML:1.0",
        "---",
        "options:",
        *(f"   {key}: {value}" for key, value in options.items()),
    ]
    for key, values in arrays.items():
        lines += [f"{key}:", f"   - [ {', '.join(map(str, values))} ]"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_structured_edges(cv2, tmp_path: Path) -> None:
    """EdgeBoxes uses the forest's edges, and the settings in a cache identify the file by its content."""
    forest = write_forest(tmp_path / "model.yml")
    image = np.zeros((96, 96, 3), dtype=np.uint8)
    image[24:72, 24:72] = (250, 40, 40)
    edges, orientation = edge_boxes_module.structured_edges(
        str(forest), image.astype(np.float32) / 255
    )
    assert edges[30:66, 20:28].max() > 0
    assert edges[40:56, 40:56].max() == 0
    assert orientation.shape == edges.shape == (96, 96)
    with captured_log() as lines:
        method = build_proposals(proposal_settings(proposals="edge_boxes", edge_model=str(forest)))
    assert not lines
    assert method.settings["edges"].startswith("structured forest ")
    boxes = pickle.loads(pickle.dumps(method))(as_tensor(image), SampleRNG(0))  # noqa: S301 - as dataloader workers receive it
    expected, _ = cv2.ximgproc.createEdgeBoxes(maxBoxes=512).getBoundingBoxes(edges, orientation)
    assert boxes[:, :2].int().tolist() == expected[:, :2].tolist()
    forest.write_text(forest.read_text().replace("0.05", "0.06"))
    assert EdgeBoxes(str(forest)).settings != method.settings


def test_wrong_or_missing_edge_model(cv2, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--edge_model .*none can't be read"):
        build_proposals(
            proposal_settings(proposals="edge_boxes", edge_model=str(tmp_path / "none"))
        )
    (tmp_path / "text.yml").write_text("hello")
    with pytest.raises(UserError, match="no structured forest of OpenCV"):
        build_proposals(
            proposal_settings(proposals="edge_boxes", edge_model=str(tmp_path / "text.yml"))
        )
    with captured_log() as lines:
        build_proposals(proposal_settings(proposals="edge_boxes", edge_model=""))
    assert len(lines) == 1
    assert "plain image gradients" in lines[0]
    with pytest.raises(UserError, match="--edge_model has no effect with --proposals random"):
        build_proposals(proposal_settings(proposals="random", num_patches=3, edge_model="x"))


@pytest.mark.parametrize("name", ["selective_search", "edge_boxes"])
def test_missing_opencv_gives_a_one_line_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(__version__="4.10.0"))
    with pytest.raises(UserError, match="4.10.0 has no ximgproc.*opencv-contrib-python-headless"):
        build_proposals(proposal_settings(proposals=name))
    true_import = builtins.__import__
    monkeypatch.delitem(sys.modules, "cv2")

    def no_cv2(module: str, *args, **kwargs):
        if module == "cv2":
            raise ImportError
        return true_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_cv2)
    with pytest.raises(UserError, match="pip install opencv-contrib-python-headless"):
        build_proposals(proposal_settings(proposals=name))


# Selection


def test_selection_strategies() -> None:
    assert select_indices(100, "topk", 30, SampleRNG(0)).tolist() == list(range(30))
    assert select_indices(7, "topk", 30, SampleRNG(0)).tolist() == list(range(7))
    drawn = select_indices(100, "random", 30, SampleRNG(0))
    assert len(set(drawn.tolist())) == 30
    assert drawn.max() > 80
    assert select_indices(4, "random", 30, SampleRNG(0)).sort().values.tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="--strategy best is unknown"):
        select_indices(4, "best", 30, SampleRNG(0))
    for strategy in ("topk", "random", "mc"):
        assert len(select_indices(0, strategy, 30, SampleRNG(0))) == 0


def test_importance_sampling_follows_the_published_probabilities() -> None:
    taken = np.zeros(400)
    for seed in range(1500):
        taken[select_indices(400, "mc", 30, SampleRNG(seed)).numpy()] += 1
    expected = -np.log(np.arange(1, 301) / 301) / 10
    assert taken[300:].sum() == 0
    assert np.abs(taken[:300] / 1500 - expected).max() < 0.06
    assert abs(taken.sum() / 1500 - expected.sum()) < 0.5


def test_fixed_number_of_boxes() -> None:
    image = torch.zeros(3, 80, 100)
    boxes = torch.tensor([[10.0, 10, 50, 30], [60, 40, 100, 80]])
    first = FixedNumProposals(lambda *_: boxes, 1)(image, SampleRNG(0), "a")
    assert torch.equal(first, boxes[:1])
    filled = FixedNumProposals(lambda *_: boxes, 5)(image, SampleRNG(0), "a")
    assert torch.equal(filled[:2], boxes)
    assert torch.equal(filled, pad_with_jittered_boxes(boxes, 5, (80, 100), SampleRNG(0)))
    shift = (filled[2:] - boxes[[0, 1, 0]]).abs()
    assert shift.max() > 0
    sides = torch.tensor([[40, 20, 40, 20], [40, 40, 40, 40], [40, 20, 40, 20]])
    assert bool((shift <= 0.1 * sides).all())
    assert bool((filled[:, 2:] <= torch.tensor([100, 80])).all())
    with pytest.raises(BadImageError, match="too few proposals"):
        FixedNumProposals(lambda *_: boxes[:0], 5)(image, SampleRNG(0), "a")


def test_selected_proposals_keep_the_order_of_the_method() -> None:
    boxes = torch.arange(40.0).reshape(10, 4)
    propose = SelectedProposals(lambda *_: boxes, "topk", 3)
    assert torch.equal(propose(torch.zeros(3, 5, 5), SampleRNG(0), "a"), boxes[:3])


# Files


def from_file(path: object):
    return build_proposals(proposal_settings(proposals=f"file:{path}"))


IMAGE = torch.zeros(3, 60, 80, dtype=torch.uint8)
COCO = {
    "images": [
        {"id": 9, "file_name": "b/x.jpg"},
        {"id": 4, "file_name": "a/x.jpg"},
        {"id": 5, "file_name": "empty.jpg"},
    ],
    "annotations": [
        {"image_id": 9, "bbox": [10, 20, 5, 6], "score": 0.2},
        {"image_id": 4, "bbox": [1, 2, 3, 4], "score": 0.1},
        {"image_id": 9, "bbox": [70, 50, 50, 50], "score": 0.9},
        {"image_id": 9, "bbox": [90, 5, 5, 5], "score": 0.8},
    ],
}


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_coco_file_with_scores(tmp_path: Path) -> None:
    """Boxes are found by relative path, clipped and best first; a box outside the image is dropped."""
    whole = from_file(write_json(tmp_path / "boxes.json", COCO))
    results = write_json(tmp_path / "results.json", COCO["annotations"])
    parts = from_file(
        f"{results},{write_json(tmp_path / 'images.json', {'images': COCO['images']})}"
    )
    for method in (whole, parts, pickle.loads(pickle.dumps(whole))):  # noqa: S301 - as dataloader workers receive it
        assert method(IMAGE, SampleRNG(0), "b/x.jpg").tolist() == [
            [70, 50, 80, 60],
            [10, 20, 15, 26],
        ]
        assert method(IMAGE, SampleRNG(0), "a/x.jpg").tolist() == [[1, 2, 4, 6]]
        assert method(IMAGE, SampleRNG(0), "empty.jpg").shape == (0, 4)
        with pytest.raises(UserError, match="lists no image x.jpg"):
            method(IMAGE, SampleRNG(0), "x.jpg")


def test_coco_boxes_without_scores_are_shuffled(tmp_path: Path) -> None:
    annotations = [{"image_id": 4, "bbox": [i, 0, 5, 5], "iscrowd": int(i == 7)} for i in range(20)]
    method = from_file(write_json(tmp_path / "boxes.json", {**COCO, "annotations": annotations}))
    orders = [method(IMAGE, SampleRNG(seed), "a/x.jpg")[:, 0].tolist() for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == [i for i in range(20) if i != 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], "does not say which image is which"),
        ({"images": []}, "has no list 'annotations'"),
        ({**COCO, "annotations": [{"image_id": 77, "bbox": [1, 2, 3, 4]}]}, "no COCO file"),
        ({**COCO, "annotations": [{"image_id": 4, "bbox": [1, 2, 3]}]}, "no COCO file"),
        (
            {**COCO, "annotations": [*COCO["annotations"], {"image_id": 4, "bbox": [1, 2, 3, 4]}]},
            "1 of 5 boxes have no score",
        ),
        (
            {**COCO, "images": [*COCO["images"], {"id": 4, "file_name": "c"}]},
            "two images have the same id",
        ),
        (
            {**COCO, "images": [*COCO["images"], {"id": 6, "file_name": "a/x.jpg"}]},
            "two images have the same file_name",
        ),
    ],
)
def test_bad_coco_files(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "boxes.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    with pytest.raises(UserError, match=message):
        from_file(tmp_path / "boxes.json")


def test_published_caches(tmp_path: Path) -> None:
    """DETReg: an array under the base name. Siamese DETR: a pickled dict under the relative path, best first."""
    detreg, siamese = tmp_path / "detreg", tmp_path / "siamese"
    (siamese / "n01").mkdir(parents=True)
    detreg.mkdir()
    boxes = np.array([[1, 2, 30, 40], [5, 6, 20, 20], [0, 0, 80, 60]], dtype=np.float32)
    np.save(detreg / "pic.npy", boxes)
    for scores in (np.array([[0.9], [0.5], [0.1]]), np.array([0.9, 0.5, 0.1])):
        np.save(siamese / "n01" / "pic.npy", {"box": boxes.astype(np.int64), "score": scores})
        assert from_file(siamese)(IMAGE, SampleRNG(0), "n01/pic.JPEG").tolist() == boxes.tolist()
    orders = [
        from_file(detreg)(IMAGE, SampleRNG(seed), "deep/pic.jpg").tolist() for seed in range(6)
    ]
    assert all(sorted(order) == sorted(boxes.tolist()) for order in orders)
    assert len({str(order) for order in orders}) > 1
    with pytest.raises(UserError, match="has no file for n01/other.jpg"):
        from_file(siamese)(IMAGE, SampleRNG(0), "n01/other.jpg")


def test_caches_of_older_numpy(tmp_path: Path) -> None:
    """Their pickles have the old name of the module, and an older protocol."""
    boxes = np.array([[1, 2, 30, 40], [5, 6, 20, 20]])
    content = np.array(
        {"box": boxes, "score": np.array([0.9, 0.5], dtype=np.float32)}, dtype=object
    )
    with (tmp_path / "pic.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": ()}
        )
        file.write(pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core"))
    assert from_file(tmp_path)(IMAGE, SampleRNG(0), "pic.jpg").tolist() == boxes.tolist()


def test_equal_base_names_in_a_flat_folder_are_rejected(tmp_path: Path) -> None:
    for folder in ("images/a", "images/b"):
        write_images(tmp_path / folder, 1)
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "000.npy", np.array([[0, 0, 5, 5.0]]))
    with pytest.raises(
        UserError, match=r"000\.npy would be used for a/000\.png and for b/000\.png"
    ):
        build_proposals(
            proposal_settings(proposals=f"file:{tmp_path / 'cache'}"),
            ImageFolder(str(tmp_path / "images")),
        )


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def test_npy_files_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("pic.npy", {"box": RunsCode()})
    with pytest.raises(UserError, match=r"pic\.npy can't be read \(it contains a posix.mkdir"):
        from_file(tmp_path)(IMAGE, SampleRNG(0), "pic.jpg")
    assert not Path("it_ran").exists()
    np.save("pic.npy", np.zeros((3, 7)))
    with pytest.raises(UserError, match=r"has float64 \[3, 7\]; expected boxes"):
        from_file(tmp_path)(IMAGE, SampleRNG(0), "pic.jpg")
    np.save("pic.npy", {"box": np.zeros((3, 4)), "score": np.zeros(2)})
    with pytest.raises(UserError, match="3 boxes and 2 scores"):
        from_file(tmp_path)(IMAGE, SampleRNG(0), "pic.jpg")
    np.save("plain.npy", np.arange(6))
    assert read_npy(Path("plain.npy")).tolist() == list(range(6))


def test_npz_archive(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "boxes.npz",
        **{
            "a/x.jpg": np.array([[0, 0, 5, 5, 0.1], [1, 1, 9, 9, 0.7]]),
            "b/x.jpg": np.zeros((0, 4)),
        },
    )
    method = from_file(tmp_path / "boxes.npz")
    assert method(IMAGE, SampleRNG(0), "a/x.jpg").tolist() == [[1, 1, 9, 9], [0, 0, 5, 5]]
    assert len(method(IMAGE, SampleRNG(0), "b/x.jpg")) == 0
    with pytest.raises(UserError, match="has no array x.jpg"):
        pickle.loads(pickle.dumps(method))(IMAGE, SampleRNG(0), "x.jpg")  # noqa: S301 - as dataloader workers receive it
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="no .npz file"):
        from_file(tmp_path / "bad.npz")


def test_damaged_and_invalid_files_give_one_line_errors(tmp_path: Path) -> None:
    archive, boxes = tmp_path / "boxes.npz", np.array([[1, 1, 5, 5.0]])
    np.savez(archive, **{"a.jpg": boxes, "b.jpg": np.array({"box": boxes}, dtype=object)})
    data = bytearray(archive.read_bytes())
    data[150] ^= 255
    archive.write_bytes(data)
    np.save(tmp_path / "a.npy", {"box": [[1, 2, 3, 4], [1, 2]]})
    np.save(tmp_path / "b.npy", {"box": boxes, "score": ["high"]})
    # A pickle that ends in an IndexError.
    header = (tmp_path / "a.npy").read_bytes()[:128]
    (tmp_path / "c.npy").write_bytes(header + b"\x80\x04R.")
    for path, name, message in (
        (archive, "a.jpg", "array a.jpg can't be read .Bad CRC"),
        (archive, "b.jpg", "array b.jpg can't be read .Obj"),
        (tmp_path, "a.jpg", "a.npy has rows of different"),
        (tmp_path, "b.jpg", "b.npy has .* 1 scores .<U4"),
        (tmp_path, "c.jpg", "c.npy can't be read"),
    ):
        with pytest.raises(UserError, match=message):
            from_file(path)(IMAGE, SampleRNG(0), name)


def test_missing_files_and_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        from_file(tmp_path / "none.json")
    (tmp_path / "boxes.txt").write_text("1 2 3 4")
    with pytest.raises(UserError, match=r"unsupported format \.txt; give a COCO file"):
        from_file(tmp_path / "boxes.txt")


def test_missing_images_are_an_error_at_the_start(tmp_path: Path) -> None:
    images = ImageFolder(str(write_images(tmp_path / "images", 3)))
    content = {"images": [{"id": 1, "file_name": "000.png"}], "annotations": []}
    path = write_json(tmp_path / "boxes.json", content)
    with pytest.raises(UserError, match=r"has no boxes for 2 of 3 images, the first is 001\.png"):
        build_proposals(proposal_settings(proposals=f"file:{path}"), images)


@pytest.mark.parametrize("box", [[0.1, 0.2, 0.5, 0.75], [0.5, 0.25, 1.0, 1.0]])
def test_boxes_in_fractions_are_an_error_at_the_start(tmp_path: Path, box: list[float]) -> None:
    images = ImageFolder(str(write_images(tmp_path / "images", 2)))
    content = {
        "images": [{"id": i, "file_name": f"00{i}.png"} for i in range(2)],
        "annotations": [{"image_id": 1, "bbox": box}],
    }
    coco = write_json(tmp_path / "boxes.json", content)
    np.savez(tmp_path / "boxes.npz", **{f"00{i}.png": np.array([box]) for i in range(2)})
    for path, count in ((coco, 1), (tmp_path / "boxes.npz", 2)):
        with pytest.raises(
            UserError, match=f"all {count} boxes of 2 images .* look like fractions"
        ):
            build_proposals(proposal_settings(proposals=f"file:{path}"), images)


def test_missing_images_get_the_name_that_may_be_meant(tmp_path: Path) -> None:
    images = ImageFolder(str(write_images(tmp_path / "images", 1)))
    content = {"images": [{"id": 1, "file_name": "a\\000.JPG"}], "annotations": []}
    coco = write_json(tmp_path / "boxes.json", content)
    np.savez(tmp_path / "boxes.npz", **{"train/000.png": np.zeros((0, 4))})
    (tmp_path / "boxes" / "deep" / "er").mkdir(parents=True)
    np.save(tmp_path / "boxes" / "deep" / "er" / "other.npy", np.zeros((0, 4)))
    for path, hint in (
        (coco, r"000\.png \(did you mean a\\000\.JPG\?\); names are relative"),
        (tmp_path / "boxes.npz", r"000\.png \(did you mean train/000\.png\?\); names"),
        (tmp_path / "boxes", r"000\.png \(it has deep/er/other\.npy, for example\); it needs"),
    ):
        with pytest.raises(UserError, match=hint):
            build_proposals(proposal_settings(proposals=f"file:{path}"), images)
