"""Panoptic quality: cases computed by hand, and a plain implementation, pixel by pixel, to compare with."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.evaluators import detections as detections_module
from datasets.evaluators.panoptic import PanopticEvaluator
from datasets.evaluators.per_class import class_table
from util.errors import UserError

PERSON, CAR, SKY, GRASS = 1, 3, 187, 193
THINGS = {PERSON: True, CAR: True, SKY: False, GRASS: False}
NAMES = {PERSON: "person", CAR: "car", SKY: "sky", GRASS: "grass"}

Scene = tuple[np.ndarray, list[dict]]  # ids [H, W] and segments_info of the ground truth


def scene(row: str, categories: dict[str, int], crowds: str = "") -> Scene:
    """Return an image of one row: each letter is a pixel of that segment, and a dot is void. Ids are 10, 20, ..."""
    number = {letter: 10 * i for i, letter in enumerate(categories, start=1)}
    ids = np.array([[number.get(letter, 0) for letter in row]])
    segments = [
        {
            "id": number[letter],
            "category_id": category,
            "iscrowd": int(letter in crowds),
            "area": row.count(letter),
        }
        for letter, category in categories.items()
    ]
    return ids, segments


def predicted(row: str, categories: dict[str, int]) -> dict[str, Any]:
    """Return a prediction in the same way, with ids 0, 1, ..."""
    number = {letter: i for i, letter in enumerate(categories)}
    ids = np.array([[number.get(letter, -1) for letter in row]])
    segments = [{"id": number[k], "category_id": category} for k, category in categories.items()]
    return {"ids": ids, "segments_info": segments}


def evaluator(scenes: dict[int, Scene], folder: Path | None = None) -> PanopticEvaluator:
    return PanopticEvaluator(THINGS, NAMES, scenes.__getitem__, scenes, folder)


def summary(truth: Scene, prediction: dict[str, Any]) -> dict[str, Any]:
    panoptic = evaluator({7: truth})
    panoptic.update({7: prediction})
    return panoptic.summarize()


def qualities(pq: float, sq: float, rq: float, n: int) -> dict[str, Any]:
    return {"pq": pytest.approx(pq), "sq": pytest.approx(sq), "rq": pytest.approx(rq), "n": n}


NOTHING = {"pq": -1, "sq": -1, "rq": -1, "n": 0}

# ------------------------------------------------------------------------------------------------------------- by hand


def test_match_miss_and_wrong_segment() -> None:
    """Per class and mean.

    person: a has 4 pixels, A has 5, in common 4: IoU 4 / (4 + 5 - 4) = 0.8, a match. b is missed.
        PQ = 0.8 / (1 + 1/2) = 8/15, SQ = 0.8, RQ = 1 / (1 + 1/2) = 2/3.
    sky: s has 6 pixels, S has 6, in common 5: IoU 5 / (6 + 6 - 5) = 5/7, a match. PQ = SQ = 5/7, RQ = 1.
    car: C is wrong. PQ = SQ = RQ = 0.
    """
    truth = scene("aaaassssssbb", {"a": PERSON, "b": PERSON, "s": SKY})
    guess = predicted("AAAASSSSSSSC", {"A": PERSON, "S": SKY, "C": CAR})
    guess["ids"][0, 4] = (
        0  # A takes a pixel of the sky: IoU of the sky 6 / (6 + 7 - 6) -> see below
    )
    result = summary(truth, guess)
    # Now S has 6 pixels, 5 of them in s: IoU 5 / (6 + 6 - 5) = 5/7, still a match.
    assert result["PQ_th"] == qualities((8 / 15 + 0) / 2, 0.8 / 2, (2 / 3) / 2, 2)
    assert result["PQ_st"] == qualities(5 / 7, 5 / 7, 1, 1)
    assert result["PQ_all"] == qualities(
        (8 / 15 + 5 / 7) / 3, (0.8 + 5 / 7) / 3, (2 / 3 + 1) / 3, 3
    )
    rows = result["panoptic_per_class"]
    assert rows == [
        {
            "id": PERSON,
            "name": "person",
            "isthing": True,
            "segments": 2,
            "PQ": pytest.approx(8 / 15),
            "SQ": pytest.approx(0.8),
            "RQ": pytest.approx(2 / 3),
        },
        {"id": CAR, "name": "car", "isthing": True, "segments": 0, "PQ": 0, "SQ": 0, "RQ": 0},
        {
            "id": SKY,
            "name": "sky",
            "isthing": False,
            "segments": 1,
            "PQ": pytest.approx(5 / 7),
            "SQ": pytest.approx(5 / 7),
            "RQ": 1,
        },
    ]
    table = class_table(rows).splitlines()
    assert table[0] == "PQ, SQ, RQ and segments of each class:"
    assert table[1].split()[:6] == ["1", "person", "0.533", "0.800", "0.667", "2"]


def test_iou_of_exactly_half_is_no_match() -> None:
    """4 pixels, 2 of them predicted, 2 / 4: one segment is missed and one is wrong. With 3 / 4 they match."""
    truth = scene("aaaassss", {"a": PERSON, "s": SKY})
    half = predicted("AASSSSSS", {"A": PERSON, "S": SKY})
    # The sky: 4 / (4 + 6 - 4) = 2/3.
    assert summary(truth, half)["PQ_all"] == qualities((0 + 2 / 3) / 2, (0 + 2 / 3) / 2, 0.5, 2)
    more = predicted("AAASSSSS", {"A": PERSON, "S": SKY})
    # The sky: 4 / (4 + 5 - 4) = 4/5.
    assert summary(truth, more)["PQ_all"] == qualities(
        (3 / 4 + 4 / 5) / 2, (3 / 4 + 4 / 5) / 2, 1, 2
    )


def test_void_pixels_are_not_part_of_the_union() -> None:
    """A has 6 pixels, 3 in void: IoU 3 / (6 + 4 - 3 - 3) = 3/4. With void it would be 3/7, no match."""
    result = summary(
        scene("aaaa...s", {"a": PERSON, "s": SKY}), predicted(".AAAAAA.", {"A": PERSON})
    )
    assert result["PQ_th"] == qualities(3 / 4, 3 / 4, 1, 1)
    assert result["PQ_st"] == qualities(0, 0, 0, 1)


@pytest.mark.parametrize(("row", "is_wrong"), [("AAAA", True), (".AAA", False), ("..AA", False)])
def test_prediction_in_void_is_ignored(row: str, is_wrong: bool) -> None:
    """The ground truth has 2 pixels of sky, then 2 void ones: more than half in void is ignored, half is wrong."""
    truth = scene("ss..", {"s": SKY})
    result = summary(truth, predicted(row, {"A": CAR}))
    assert result["PQ_st"] == qualities(0, 0, 0, 1)
    assert result["PQ_th"] == (qualities(0, 0, 0, 1) if is_wrong else NOTHING)


def test_crowds() -> None:
    """A crowd is neither matched nor missed, and ignores predictions of its class with most pixels in it."""
    truth = scene("ccccaaaass", {"c": PERSON, "a": PERSON, "s": SKY}, crowds="c")
    # P covers the whole crowd: ignored. A is a perfect match. Nothing of the sky: missed.
    only_a = {"A": PERSON, "P": PERSON}
    result = summary(truth, predicted("PPPPAAAA..", only_a))
    assert result["PQ_th"] == qualities(1, 1, 1, 1)
    assert result["panoptic_per_class"][0]["segments"] == 1
    # A car on the crowd of persons is wrong.
    result = summary(truth, predicted("PPPPAAAA..", {"A": PERSON, "P": CAR}))
    assert result["PQ_th"] == qualities(0.5, 0.5, 0.5, 2)
    # Half in the crowd is not most of it. P: 2 of 4 pixels. A: 2 / (2 + 4 - 2) = 1/2, no match and wrong.
    result = summary(truth, predicted("..PPPPAA..", only_a))
    assert result["PQ_th"] == qualities(0, 0, 0, 1)


def test_of_several_crowds_of_a_class_the_last_one_counts() -> None:
    """As in panopticapi. The prediction has 2 of its 4 pixels in either crowd: not most in the last one."""
    truth = scene("ccddss", {"c": PERSON, "d": PERSON, "s": SKY}, crowds="cd")
    result = summary(truth, predicted("PPPPSS", {"P": PERSON, "S": SKY}))
    assert result["PQ_th"] == qualities(0, 0, 0, 1)
    result = summary(truth, predicted("..PPSS", {"P": PERSON, "S": SKY}))
    assert result["PQ_th"] == NOTHING


def test_crowd_and_void_count_together() -> None:
    """2 of 5 pixels in the crowd and 1 in void: 3/5 are ignored, either alone is not enough."""
    truth = scene("cc.ssss", {"c": PERSON, "s": SKY}, crowds="c")
    result = summary(truth, predicted("PPPPP..", {"P": PERSON}))
    assert result["PQ_th"] == NOTHING


# ------------------------------------------------------------------------------------------------------- special cases


def test_perfect_prediction() -> None:
    truth = scene("aabbss.gg", {"a": PERSON, "b": PERSON, "s": SKY, "g": GRASS})
    guess = predicted("AABBSS.GG", {"A": PERSON, "B": PERSON, "S": SKY, "G": GRASS})
    for result in (
        summary(truth, guess),
        summary(truth, {**guess, "ids": torch.tensor(guess["ids"])}),
    ):
        assert result["PQ_all"] == qualities(1, 1, 1, 3)
        assert result["PQ_th"] == qualities(1, 1, 1, 1)
        assert result["PQ_st"] == qualities(1, 1, 1, 2)


def test_images_without_prediction_are_missed() -> None:
    scenes = {i: scene("aass", {"a": PERSON, "s": SKY}) for i in (3, 4)}
    guess = predicted("AASS", {"A": PERSON, "S": SKY})
    none = evaluator(scenes).summarize()
    assert none["PQ_all"] == none["PQ_all"] | {"pq": 0, "sq": 0, "rq": 0, "n": 2}
    assert [row["segments"] for row in none["panoptic_per_class"]] == [2, 2]
    # One of two: PQ = 1 / (1 + 1/2).
    one = evaluator(scenes)
    one.update({4: guess})
    assert one.summarize()["PQ_all"] == qualities(2 / 3, 1, 2 / 3, 2)


@pytest.mark.parametrize("value", [0, -1])
def test_prediction_without_segments(value: int) -> None:
    """The published post-processing returns zeros if no mask is kept."""
    truth = scene("aass", {"a": PERSON, "s": SKY})
    guess = {"ids": np.full((1, 4), value), "segments_info": []}
    assert summary(truth, guess) == evaluator({7: truth}).summarize()


def test_without_ground_truth_there_is_no_nan() -> None:
    all_void = scene("....", {})
    assert evaluator({}).summarize()["PQ_all"] == NOTHING
    assert evaluator({7: all_void}).summarize()["PQ_all"] == NOTHING
    result = summary(all_void, predicted("AAA.", {"A": PERSON}))
    assert result == dict.fromkeys(("PQ_all", "PQ_th", "PQ_st"), NOTHING) | {
        "panoptic_per_class": []
    }
    no_categories = PanopticEvaluator({}, {}, {7: all_void}.__getitem__, [7])
    assert no_categories.summarize()["PQ_all"] == NOTHING


def test_ids_of_three_bytes_and_missing_areas() -> None:
    ids = np.array([[2**24 - 1, 2**24 - 1, 65536, 65536]], np.uint32)
    segments = [
        {"id": 2**24 - 1, "category_id": PERSON, "iscrowd": 0},
        {"id": 65536, "category_id": SKY, "iscrowd": 0},
    ]
    guess = {"ids": ids.astype(np.int64) - 1, "segments_info": [dict(s) for s in segments]}
    for segment in guess["segments_info"]:
        segment["id"] -= 1
    assert summary((ids, segments), guess)["PQ_all"] == qualities(1, 1, 1, 2)


def test_errors_name_the_image() -> None:
    panoptic = evaluator({7: scene("aass", {"a": PERSON, "s": SKY})})
    good = predicted("AASS", {"A": PERSON, "S": SKY})
    with pytest.raises(ValueError, match="image 9 is not in the annotations"):
        panoptic.update({9: good})
    with pytest.raises(UserError, match=r"image 7: the prediction has .* \(1, 3\), .* \(1, 4\)"):
        panoptic.update({7: predicted("AAS", {"A": PERSON, "S": SKY})})
    with pytest.raises(UserError, match="image 7: a predicted segment has category 99"):
        panoptic.update({7: predicted("AASS", {"A": 99, "S": SKY})})
    with pytest.raises(ValueError, match="image 7: segment 1 of the ids is not in segments_info"):
        panoptic.update({7: {**good, "segments_info": good["segments_info"][:1]}})
    with pytest.raises(ValueError, match="image 7: segment 1 of segments_info has no pixel"):
        panoptic.update({7: {**good, "ids": np.zeros((1, 4), int)}})
    unknown = evaluator({7: scene("aass", {"a": 99, "s": SKY})})
    with pytest.raises(UserError, match="image 7: the ground truth has category 99"):
        unknown.update({7: good})


# -------------------------------------------------------------------------------------- against a plain implementation


def random_scene(rng: np.random.RandomState) -> Scene:
    """Blocks of random segments, with void and crowds."""
    numbers = np.unique(rng.randint(1, 2**24, rng.randint(0, 9)))
    blocks = rng.randint(0, len(numbers) + 1, rng.randint(1, 5, 2))
    ids = np.append(numbers, 0)[blocks.repeat(6, 0).repeat(6, 1)]
    segments = [
        {
            "id": int(number),
            "category_id": int(rng.choice(list(THINGS))),
            "iscrowd": int(rng.rand() < 0.2),
            "area": int((ids == number).sum()),
        }
        for number in numbers
        if (ids == number).any()
    ]
    return ids, segments


def perturbed(rng: np.random.RandomState, truth: Scene) -> dict[str, Any]:
    """The ground truth, shifted and with random pixels, and some segments with another class, merged or removed."""
    ids, segments = truth
    numbers = [-1] + [segment["id"] for segment in segments]
    ids = np.where(ids == 0, -1, ids)
    ids = np.roll(ids, rng.randint(-1, 2, 2), (0, 1))
    noise = rng.rand(*ids.shape) < rng.choice([0, 0.1, 0.3])
    ids[noise] = rng.choice(numbers, noise.sum())
    categories = {segment["id"]: segment["category_id"] for segment in segments}
    for number in categories:
        change = rng.rand()
        if change < 0.15:
            categories[number] = int(rng.choice(list(THINGS)))
        elif change < 0.3:
            ids[ids == number] = rng.choice(numbers)
    return {
        "ids": ids,
        "segments_info": [
            {"id": number, "category_id": category}
            for number, category in categories.items()
            if (ids == number).any()
        ],
    }


def plain_quality(pairs: Iterable[tuple[Scene, dict[str, Any]]]) -> dict[int, tuple[float, ...]]:
    """Return category id -> (PQ, SQ, RQ), from sets of pixels and the rules of panopticapi."""
    ious: dict[int, list[float]] = {category: [] for category in THINGS}
    errors = dict.fromkeys(THINGS, 0)  # missed and wrong segments
    for (true_ids, true_segments), prediction in pairs:
        true = {s["id"]: pixels_of(true_ids, s["id"]) for s in true_segments}
        guess = {
            s["id"]: pixels_of(prediction["ids"], s["id"]) for s in prediction["segments_info"]
        }
        void = pixels_of(true_ids, 0)
        matched: set[tuple[str, int]] = set()
        for t in true_segments:
            for p in prediction["segments_info"]:
                common = true[t["id"]] & guess[p["id"]]
                union = true[t["id"]] | (guess[p["id"]] - void)
                if t["iscrowd"] or t["category_id"] != p["category_id"]:
                    continue
                if len(common) / len(union) > 0.5:
                    ious[t["category_id"]].append(len(common) / len(union))
                    matched |= {("true", t["id"]), ("guess", p["id"])}
        for t in true_segments:
            if not t["iscrowd"] and ("true", t["id"]) not in matched:
                errors[t["category_id"]] += 1
        for p in prediction["segments_info"]:
            if ("guess", p["id"]) in matched:
                continue
            crowds = [
                t["id"]
                for t in true_segments
                if t["iscrowd"] and t["category_id"] == p["category_id"]
            ]
            ignored = void | (true[crowds[-1]] if crowds else set())
            if len(guess[p["id"]] & ignored) / len(guess[p["id"]]) <= 0.5:
                errors[p["category_id"]] += 1
    result = {}
    for category, values in ious.items():
        total = len(values) + errors[category] / 2
        if total:
            sq = sum(values) / len(values) if values else 0
            result[category] = (sum(values) / total, sq, len(values) / total)
    return result


def pixels_of(ids: np.ndarray, number: int) -> set[tuple[int, int]]:
    height, width = ids.shape
    return {(y, x) for y in range(height) for x in range(width) if ids[y, x] == number}


def random_scenes(seed: int, count: int = 6) -> tuple[dict[int, Scene], dict[int, dict[str, Any]]]:
    rng = np.random.RandomState(seed)
    scenes = {int(i): random_scene(rng) for i in rng.choice(10**6, count, replace=False)}
    return scenes, {i: perturbed(rng, truth) for i, truth in scenes.items()}


def test_equals_a_plain_implementation() -> None:
    values = []
    for seed in range(30):
        scenes, guesses = random_scenes(seed)
        panoptic = evaluator(scenes)
        panoptic.update(guesses)
        result = panoptic.summarize()
        expected = plain_quality((scenes[i], guesses[i]) for i in scenes)
        rows = {r["id"]: (r["PQ"], r["SQ"], r["RQ"]) for r in result["panoptic_per_class"]}
        assert rows.keys() == expected.keys(), seed
        for category, row in rows.items():
            assert row == pytest.approx(expected[category]), (seed, category)
        for name, group in (
            ("PQ_all", list(expected)),
            ("PQ_th", [c for c in expected if THINGS[c]]),
            ("PQ_st", [c for c in expected if not THINGS[c]]),
        ):
            mean = np.mean([expected[c] for c in group], axis=0) if group else (-1, -1, -1)
            assert result[name] == qualities(*mean, len(group)), seed
        values.append(result["PQ_all"]["pq"])
    assert 0.2 < np.mean(values) < 0.8, "neither trivial nor hopeless"


# --------------------------------------------------------------------------------------------------- several processes


def merged_with(
    other: PanopticEvaluator, names: Iterable[str]
) -> Callable[[dict], list[dict[int, Any]]]:
    """Return what replaces all_gather_object: the values of two ranks, for each of these attributes in turn."""
    theirs = iter([getattr(other, name) for name in names])
    return lambda mine: [mine, next(theirs)]


def test_image_seen_by_two_ranks_counts_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scenes, guesses = random_scenes(0)
    alone = evaluator(scenes)
    for _ in range(2):  # seen twice
        alone.update(guesses)
    ids = sorted(scenes)
    first, second = evaluator(scenes, tmp_path), evaluator(scenes, tmp_path)
    first.update({i: guesses[i] for i in ids[::-2]})
    second.update({i: guesses[i] for i in [ids[-1], *ids]})
    gather = merged_with(second, ("_counts", "_records"))
    monkeypatch.setattr(detections_module, "all_gather_object", gather)
    first.synchronize_between_processes()
    assert first.summarize() == alone.summarize()
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [record["image_id"] for record in content["annotations"]] == ids


def test_memory_does_not_grow_with_the_pixels() -> None:
    scenes, guesses = random_scenes(1, count=40)
    panoptic = evaluator(scenes)
    panoptic.update(guesses)
    sizes = [counts.nbytes for counts in panoptic._counts.values()]
    assert max(sizes) < 1000
    assert panoptic._records == {}, "no folder"


# --------------------------------------------------------------------------------------------------------------- files


def test_files_as_published(tmp_path: Path) -> None:
    """Ids are one larger in files, where 0 is void."""
    truth = scene("aassgg..", {"a": PERSON, "s": SKY, "g": GRASS})
    folder = tmp_path / "panoptic_eval"
    panoptic = evaluator({7: truth}, folder)
    guess = {
        "ids": np.array([[0, 0, 255, 255, 70000, 70000, -1, -1]]),
        "segments_info": [
            {"id": 0, "isthing": True, "category_id": PERSON, "area": 2},
            {"id": 255, "isthing": False, "category_id": SKY, "area": 2},
            {"id": 70000, "isthing": False, "category_id": GRASS, "area": 2},
        ],
    }
    panoptic.update({7: guess})
    panoptic.synchronize_between_processes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "000000000007.png",
        "predictions.json",
    ]
    with Image.open(folder / "000000000007.png") as image:
        assert image.mode == "RGB"
        colors = np.asarray(image).astype(int)
    ids = colors @ [1, 256, 65536]
    assert ids.tolist() == [[1, 1, 256, 256, 70001, 70001, 0, 0]]
    assert json.loads((folder / "predictions.json").read_text()) == {
        "annotations": [
            {
                "image_id": 7,
                "file_name": "000000000007.png",
                "segments_info": [{**s, "id": s["id"] + 1} for s in guess["segments_info"]],
            }
        ]
    }
    assert panoptic.summarize()["PQ_all"] == qualities(1, 1, 1, 3)


def test_no_files_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    panoptic = evaluator({7: scene("aa", {"a": PERSON})})
    panoptic.update({7: predicted("AA", {"A": PERSON})})
    panoptic.synchronize_between_processes()
    assert not list(tmp_path.iterdir())
