"""The words and tables of a study's page, in Markdown. They say what the numbers say."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.evaluators.proposals import SWAPPED
from tools.compare_runs import markdown
from tools.study.plan import words_of
from tools.study.presets import ABLATIONS, NONE, UNTRAINED
from tools.study.results import AP, AP50, Cell, Results
from tools.study.statistics import Difference, in_words, paired_difference, signed, summarize
from util.logger import format_seconds
from util.runs.folder import read_record

TITLE = "# Transfer study"
WORDS, END_OF_WORDS = (
    "<!-- What you write from here ... -->",
    "<!-- ... to here is kept when this page is made anew. -->",
)


def all_parts(results: Results, drawn: Mapping[tuple[str, float], Path], base: Path, words: str) -> Iterator[str]:
    """Paragraphs, headings and tables in order. drawn: (detector, fraction) -> curves, which are named as they lie from
    `base`. words: what a person wrote into an earlier page."""
    yield TITLE
    yield from _what(results)
    yield f"{WORDS}\n{words}\n{END_OF_WORDS}"
    yield from _tables(results, drawn, base)
    yield from _recall(results)
    yield from _choice(results)
    yield from _limits(results)
    yield from _made_with(results)


def words_of_person(page: str) -> str:
    """What stands between the two marks of a page.

    Raises:
        ValueError: it has not each mark once, in their order.
    """
    before, first, rest = page.partition(WORDS)
    words, last, after = rest.partition(END_OF_WORDS)
    if not (first and last) or any(mark in part for mark in (WORDS, END_OF_WORDS) for part in (before, words, after)):
        raise ValueError("the marks of what a person wrote are not there once each")
    return words.strip("\n")


def _what(results: Results) -> Iterator[str]:
    study, data = results.study, results.study["data"]
    settings, train, test = data["settings"], data["train"], data["test"]
    yield (
        f"The same fine-tuning after each way of pre-training and after none (`{NONE}`): the same weights of the "
        f"backbone, steps, rates and order of data. Preset `{study['preset']}`: {study['preset_settings']['title']}."
    )
    if results.unfinished:
        yield (
            f"**Not finished: {len(results.unfinished)} of {len(study['steps'])} runs are left.** Cells that lack "
            f"seeds say so."
        )
    source = ", ".join(f"{name} {_text(value)}" for name, value in settings["labelled"].items())
    classes = train["boxes_by_class"]
    yield "\n".join(
        [
            *_model(study["preset_settings"].get("model")),
            f"- **Labelled** ({source}): {train['images']} training images with {train['boxes']} boxes of "
            f"{len(classes)} classes ({', '.join(classes)}); {data['val']['images']} more of the source's training "
            f"part to choose settings on; {test['images']} test images with {test['boxes']} boxes. AP is of the test "
            "images, after the last step; the tool chooses nothing on them.",
            *_left_out(settings["min_objects"]),
            _unlabelled(data["unlabelled"]),
            f"- **Sizes**: short side {settings['image_size']} pixels, in files and in training. All parts were "
            f"drawn once, with seed {settings['split_seed']}. Runs on few labels take as many steps as those on all.",
            _training(study["preset_settings"]),
        ]
    )


def _training(preset: dict[str, Any]) -> str:
    text = "- **Training**: "
    if preset["images"]:
        (first, second), (pretrained, tuned) = preset["batch"], preset["images"]
        text += (
            f"{pretrained:,} images of pre-training in batches of {first}, {tuned:,} of fine-tuning in batches "
            f"of {second}. "
        )
    frozen = {"pre-training": preset["pretrain"].get("fre_cnn"), "fine-tuning": preset["backbone_rate"] == 0}
    places = " and in ".join(name for name, is_frozen in frozen.items() if is_frozen)
    return text + (f"The CNN is frozen in {places}." if places else "How fast the CNN learns, the commands say.")


def _model(flags: dict[str, Any] | None) -> list[str]:
    """Studies of earlier versions don't say it."""
    return [f"- **Model**: `{' '.join(words_of('', flags)[1:])}`; all else as the detector has it."] if flags else []


def _left_out(least: int) -> list[str]:
    return (
        [f"- Classes with fewer than {least} objects in training or test are left out: their AP would be noise."]
        if least
        else []
    )


def _unlabelled(data: dict[str, Any]) -> str:
    own = data["of_the_labelled_training_part"]
    sources = ", ".join(part["source"] for part in data["sources"])
    text = f"- **Unlabelled**: {data['images']} images" + (f" from {sources}" if sources else "")
    text += f"; {own} of them are the labelled training images, without their labels" if own else ""
    return f"{text}. What looked like a test or validation image was left out ({data['left_out_as_held_out']} images)."


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tables(results: Results, drawn: Mapping[tuple[str, float], Path], base: Path) -> Iterator[str]:
    for (detector, fraction), rows in results.cells().items():
        yield f"## {detector}, {100 * fraction:g} % of the labels"
        table, said = [], []
        for row in rows:
            cell = detector, row, fraction
            values, fifty = results.values(cell, AP), results.values(cell, AP50)
            base_values = [results.values((detector, NONE, fraction), number) for number in (AP, AP50)]
            origins = results.origins.get(cell, {})
            compared = [
                paired_difference(mine, others, origins)
                for mine, others in zip((values, fifty), base_values, strict=True)
            ]
            if row == NONE:
                compared = [None, None]
            else:
                said.append(
                    f"- `{row}`: {in_words(compared[0])}; {in_words(compared[1], 'AP50')}.{_what_row(results, cell)}"
                )
            table.append(
                [row, _spread(values), _spread(fifty), *map(_signed, compared), _by_seed(values, results, cell)]
            )
        yield markdown(["pre-training", "AP", "AP50", f"AP - {NONE}", f"AP50 - {NONE}", "AP by seed"], table)
        codes = results.codes(detector, fraction)
        if len(codes) > 1:
            said.append(
                f"- Runs of this table were made with {len(codes)} versions of the code: {', '.join(codes)}. Where "
                "the order of images or a default differs between them, rows do too."
            )
        if said:
            yield "\n".join(said)
        if (detector, fraction) in drawn:
            place = drawn[detector, fraction]
            yield (
                f"![AP on test by epoch, {detector}, {fraction:g} of the labels]({place.relative_to(base).as_posix()})"
            )


def _what_row(results: Results, cell: Cell) -> str:
    """Of an ablation: what it changes, and what that makes of the AP of its pretext, or of the row that it differs less
    from.
    """
    detector, row, fraction = cell
    if row not in ABLATIONS:
        return ""
    text, values = f" This row: {ABLATIONS[row].says}.", results.values(cell, AP)
    for other in filter(None, (ABLATIONS[row].pretext, ABLATIONS[row].against)):
        found = paired_difference(values, results.values((detector, other, fraction), AP), results.origins.get(cell))
        text += f" Against `{other}`: {in_words(found)}." if found else ""
    return text


def _spread(values: Mapping[int, float]) -> str:
    summary = summarize(list(values.values()))
    if summary is None:
        return "-"
    return f"{summary.mean:.1f}" + (f" ± {summary.deviation:.1f}" if summary.deviation is not None else "")


def _signed(found: Difference | None) -> str:
    if found is None:
        return ""
    return signed(found.mean) + (f" ± {found.half_width:.1f}" if found.half_width is not None else " (one seed)")


def _by_seed(values: Mapping[int, float], results: Results, cell: Cell) -> str:
    """`1: 8.4, 2: 6.9`; `7 (2): 5.1` where there are several pre-trainings; `-` is a run that is left."""
    origins = results.origins.get(cell, {})
    several = len(set(origins.values())) > 1
    names = {
        seed: f"{seed} ({origins[seed]})" if several and seed in origins else f"{seed}"
        for seed in sorted(set(results.planned[cell]))
    }
    return ", ".join(f"{name}: {values[seed]:.1f}" if seed in values else f"{name}: -" for seed, name in names.items())


def _recall(results: Results) -> Iterator[str]:
    """Boxes without classes, right after pre-training."""
    if not results.recalls:
        return
    yield "## Boxes without classes, before any label was seen"
    keys = [key for name in ("AP50", "AR10", "AR100") for key in (name, SWAPPED[name])]
    rows = []
    for found in sorted(results.recalls, key=lambda found: (found.get("detector", "~"), found["variant"] != UNTRAINED)):
        name = found["variant"] if found.get("detector") else f"boxes of {found['variant']}, no model"
        numbers = [f"{100 * found[key]:.2f}" if key in found else "" for key in keys]
        rows.append([found.get("detector", ""), name, str(found.get("pretrain_seed", "")), *numbers])
    yield markdown(["detector", "pre-training", "its seed", *keys], rows)
    yield (
        "In percent, on the test images; AR10 is the recall of the best ten boxes of an image, over IoU 0.50 to "
        "0.95. **`_swapped`: with the boxes of another image. Only what is above it was found by looking at the "
        "image**; the rest is a prior over places, which is high for boxes that are well spread. `untrained` is the "
        "model as it was initialised (one step at a rate of 1e-12). Random query patch and Siamese learn to answer "
        "for patches, and here none are given. A model has as many boxes an image as queries, a method without a "
        "model up to 1000, in no order of worth."
    )


def _choice(results: Results) -> Iterator[str]:
    choices = results.study.get("choices")
    if not choices:
        return
    yield "## Choice of the learning rate"
    yield (
        "AP on the validation images, one run each, of the first seed and the largest share of the labels. The rate "
        "with the best mean is that of all fine-tunings of the detector, whatever their row."
    )
    for detector, choice in choices.items():
        rates = list(next(iter(choice["val_AP"].values())))
        rows = [[name, *(f"{values[rate]:.2f}" for rate in rates)] for name, values in choice["val_AP"].items()]
        rows.append(["taken", *("x" if float(rate) == choice["lr"] else "" for rate in rates)])
        yield markdown([f"{detector}, at rate", *rates], rows)


def _limits(results: Results) -> Iterator[str]:
    yield "## How to read it"
    lines = [
        "AP is COCO's, in percent; objects marked `difficult` count. ± behind a mean is the standard deviation "
        "over seeds.",
        "± behind a difference is the 95 % interval by Student's t of the differences seed by seed: a seed has the "
        "same images in the same order with the same augmentation in both runs. An interval that holds 0 says that "
        "these seeds show no difference, not that there is none. Of many intervals one in twenty leaves out 0 by "
        "chance.",
    ]
    lines += _pretrainings(results)
    if any(facts.get("fraction", 1) != 1 for facts in results.study["steps"].values()):
        lines.append(
            "Which images a share of the labels has was drawn once: no interval says how much another draw would "
            "differ."
        )
    if results.study["preset"] != "paper":
        lines.append(
            "Published differences are of ResNet-50 at full resolution after days of training on 1.28 million "
            "images, with a backbone of SwAV. Nothing here repeats them."
        )
    yield "\n".join(f"- {line}" for line in lines)


def _pretrainings(results: Results) -> list[str]:
    """How many there are of each row, and what the intervals make of it."""
    seeds: dict[str, set[int]] = {}
    for name, facts in results.study["steps"].items():
        if facts["kind"] == "pretrain" and facts["variant"] != UNTRAINED and name not in results.unfinished:
            seeds.setdefault(f"{facts['detector']} `{facts['variant']}`", set()).add(facts["pretrain_seed"])
    several = {row: sorted(its) for row, its in seeds.items() if len(its) > 1}
    lines = []
    if len(several) < len(seeds):
        which = "Each other row" if several else "Each pretext"
        lines.append(
            f"{which} was pre-trained once: spread and intervals are of fine-tuning alone, and say nothing on how "
            "much another pre-training would differ."
        )
    if several:
        rows = "; ".join(f"{row} {', '.join(map(str, its))}" for row, its in several.items())
        lines.insert(
            0,
            f"Pre-trained several times, with these seeds: {rows}. `7 (2)` is fine-tuning seed 7 from pre-training "
            "seed 2. Where fine-tunings share a pre-training, a difference is the mean of the means of the "
            "pre-trainings, and its interval is over these means.",
        )
    return lines


KINDS = {
    "proposals": "search of proposals",
    "pretrain": "pre-training",
    "recall": "boxes without classes",
    "finetune": "fine-tuning",
    "choose": "choice of the rate",
}


def _made_with(results: Results) -> Iterator[str]:
    starts, last = results.study["starts"], results.study["starts"][-1]
    yield "## How it was made"
    yield _block(dict.fromkeys([results.study["data"]["command"], *(start["command"] for start in starts)]))
    versions = ", ".join(f"{name} {last[name]}" for name in ("python", "torch", "torchvision", "timm") if name in last)
    where = last["gpu"] if last["gpu"] != "none" else f"CPU ({last['machine']})"
    code = ", ".join(dict.fromkeys(start["code"] for start in starts))
    yield (
        f"{where}, {last['cores']} cores, {last['jobs']} runs at once; {versions}; code {code}; started "
        f"{len(starts)} times."
    )
    rows = [
        [KINDS[kind], str(len(values)), format_seconds(sum(values)), format_seconds(sum(values) / len(values))]
        for kind, values in results.seconds.items()
    ]
    yield markdown(["runs", "finished", "their wall times added", "one on average"], rows)
    example = _examples(results)
    if example:
        yield "A pre-training and a fine-tuning, as they were run:"
        yield _block(example)


def _block(lines: Iterable[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def _examples(results: Results) -> list[str]:
    """The last commands of each kind of training; {data} and {study} stand for the two folders."""
    found: dict[str, str] = {}
    for name, facts in results.study["steps"].items():
        record = read_record(results.folder / f"{name}.json")
        if record.get("finished") and facts["kind"] in ("pretrain", "finetune") and facts["variant"] != UNTRAINED:
            found[facts["kind"]] = shlex.join(["python", *record["words"]]).replace("'", "")
    return list(found.values())
