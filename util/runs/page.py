"""The page of a run: one HTML file with its pictures inside, made from what lies in the run's folder and from nothing
else.

It is written when training begins and after each epoch, so that a run that was interrupted has one too. The parts that
make a page of anything (`page`, `picture`, `table`) are also used for the demo's.
"""

import base64
import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from util.distributed import is_main_process
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.plots.curves import BBOX_STATS, plot_logs
from util.runs.folder import EVAL_SETTINGS, SETTINGS, read_record
from util.runs.log import read_log
from util.settings.flags import FINETUNE, PRETRAIN

PAGE = "result.html"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1.2em }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em }
img { max-width: 100%; display: block; margin: 1em 0 }
table { border-collapse: collapse } td, th { padding: .35em 1em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child { text-align: left } pre { background: #f5f5f5; padding: .8em 1em; overflow-x: auto;
  white-space: pre-wrap }
td { overflow-wrap: anywhere } summary { cursor: pointer } .note { color: #555 }
"""
FILES = {
    SETTINGS: "every setting, which were given and which come from a checkpoint, versions, device, fingerprint of "
    "the data, model",
    EVAL_SETTINGS: "the same of the last run with --eval",
    "subset.json": "the images, or the objects of few shots, that it learns from, where these are a part of the data",
    "log.txt": "one JSON object an epoch: train_* and test_* values (train_seconds: of training, so far)",
    "curves.png": "losses and AP so far",
    "samples.png": "training images with their boxes, as the model gets them",
    "predictions.png": "the last evaluation's predictions beside the truth",
    "patches.png": "what the patches' queries find, after the last epoch",
    "metrics.json": "numbers of the last evaluation",
    "per_class.json": "AP of each class in it",
    "results.json": "its detections, in COCO's format",
    "checkpoint.pth": "after the last epoch, or where the run was stopped; --resume auto goes on from it",
    "checkpoint_best.pth": "of the epoch with the best AP",
}
PICTURES = (  # title, file, what it shows
    ("Curves", "curves.png", "losses and AP by epoch"),
    ("Boxes on held-out images", "predictions.png", "predictions beside the truth"),
    ("What the patches' queries find", "patches.png", "patches, their places and the boxes found"),
    (
        "Training images as the model gets them",
        "samples.png",
        "augmented, padded to their batch (striped) and normalised; the normalisation is undone here",
    ),
)


def page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1>{body}</html>"
    )


def picture(path: Path, alt: str) -> str:
    """An image of a PNG file, whose content is in the page; nothing where there is no file."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """rows: (name, cells) each; texts are escaped."""
    shown = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = [
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    ]
    return f"<table><tr><th></th>{shown}</tr>{''.join(lines)}</table>"


def report(folder: Path | None) -> None:
    """Draws curves.png, all losses and AP of the log, and writes the page. What can't be drawn is said once, and
    training goes on.
    """
    if folder is None or not is_main_process():
        return
    try:
        if (folder / "log.txt").is_file():
            plot_logs(folder, [*loss_names(read_log(folder)), "mAP"], folder / "curves.png")
    except UserError as error:
        _say_once("no curves", error)
    try:
        write_run_page(folder)
    except UserError as error:
        _say_once(f"no {PAGE}", error)


def _say_once(what: str, error: UserError) -> None:
    if (what, str(error)) not in _said:
        _said.add((what, str(error)))
        log.warning("%s: %s", what, error)


_said: set[tuple[str, str]] = set()


def write_run_page(folder: Path) -> Path:
    """result.html of a folder of training or of evaluation.

    Raises:
        UserError: a damaged log, or the page can't be written.
    """
    training, evaluation = read_record(folder / SETTINGS), read_record(folder / EVAL_SETTINGS)
    record = training or evaluation
    entries = read_log(folder) if (folder / "log.txt").is_file() else []
    body = "".join(
        [
            f'<p class="note">{html.escape(_what_it_is(record))}<br>'
            f"{html.escape(_how_far(entries, training.get('settings', {})))}</p>",
            _numbers(folder, entries),
            *(_pictured(folder, *item) for item in PICTURES),
            _settings(record),
            _surroundings(record),
            _files(folder),
            _commands(folder, training),
        ]
    )
    return write_text(folder / PAGE, page(folder.resolve().name, body))


def _what_it_is(record: Mapping[str, Any]) -> str:
    """One sentence on model, start and data."""
    settings, model = record.get("settings", {}), record.get("model") or {}
    if not settings:
        return "The settings of this run are not in its folder."
    kind = {PRETRAIN: f"Pre-training ({settings.get('pretext')})"}.get(settings.get("script"), "Fine-tuning")
    kind = "Evaluation" if settings.get("eval") else kind
    text = f"{kind} of {settings.get('detector')} on {settings.get('backbone')}"
    source = settings.get("pretrain") or settings.get("resume")
    text += f", from {source}." if source else f", backbone weights: {settings.get('backbone_weights')}."
    if model:
        text += f" {model['parameters']:,} parameters, {model['trainable']:,} trainable"
        height, width = model["multiply_adds_hw"]
        count = model["multiply_adds"]
        text += f"; {count / 1e9:.4g} G multiply-adds for an image of {height} x {width}." if count else "."
    images = record.get("images")
    if images:
        counts = images if isinstance(images, list) else [images]
        text += (
            " Images: "
            + ", ".join(f"{count:,} {name}" for count, name in zip(counts, ("to train", "held out"), strict=False))
            + "."
        )
    return text


def _how_far(entries: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    if not settings and not entries:
        return ""
    done, planned = (entries[-1].get("epoch", len(entries) - 1) + 1 if entries else 0), settings.get("epochs")
    text = f"Epochs logged: {done}" + (f" of {planned}" if planned else "")
    seconds = entries[-1].get("train_seconds") if entries else None
    return text + (f", {format_seconds(seconds)} of training." if seconds else ".")


def evaluations(entries: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[float]]]:
    """(epoch counted from 1, the numbers of COCO) of each epoch that was evaluated."""
    return [
        (e.get("epoch", i) + 1, e["test_coco_eval_bbox"]) for i, e in enumerate(entries) if e.get("test_coco_eval_bbox")
    ]


def loss_names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The weighted losses of the last decoder layer that a log has, `loss` (the sum over all layers) first."""
    names = [key.removeprefix("train_") for key in (entries[-1] if entries else {}) if key.startswith("train_loss")]
    names = [name for name in names if not name.endswith("_unscaled") and not name[-1].isdigit()]
    return sorted(names, key=lambda name: name != "loss")  # otherwise in the log's order


def _numbers(folder: Path, entries: Sequence[Mapping[str, Any]]) -> str:
    """Tables of AP and of losses, as far as there are any."""
    parts, evaluated = [], evaluations(entries)
    if not evaluated:
        stats = read_record(folder / "metrics.json").get("coco_eval_bbox")
        rows = [("this evaluation", stats)] if stats else []
    else:
        best = max(evaluated, key=lambda item: item[1][0])
        rows = [(f"last, epoch {evaluated[-1][0]}", evaluated[-1][1]), (f"best, epoch {best[0]}", best[1])]
    if rows:
        cells = [(name, [f"{value:.3f}" for value in stats[: len(BBOX_STATS)]]) for name, stats in rows]
        parts.append("<h2>Average precision on held-out images</h2>" + table(BBOX_STATS[: len(rows[0][1])], cells))
        parts.append('<p class="note">AP: over IoU 0.50 to 0.95. -1: the data has no object of that size.</p>')
    groups = read_record(folder / "metrics.json").get("few_shot")
    if groups:
        cells = [(name, [f"{value:.3f}" for value in values]) for name, values in groups.items()]
        parts.append("<h2>Base and novel classes, last evaluation</h2>" + table(BBOX_STATS[:3], cells))
    names = loss_names(entries)
    if names:
        ends = dict.fromkeys((0, len(entries) - 1))  # one row where there is one epoch
        cells = [
            (f"epoch {entries[i].get('epoch', i) + 1}", [_short(entries[i].get(f"train_{name}")) for name in names])
            for i in ends
        ]
        parts.append("<h2>Losses in training</h2>" + table([name.replace("_", " ") for name in names], cells))
    return "".join(parts)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pictured(folder: Path, title: str, name: str, alt: str) -> str:
    shown = picture(folder / name, alt)
    return (
        f'<h2>{html.escape(title)}</h2><p class="note">{html.escape(alt[0].upper() + alt[1:])}.</p>{shown}'
        if shown
        else ""
    )


def _settings(record: Mapping[str, Any]) -> str:
    settings = record.get("settings", {})
    if not settings:
        return ""
    given, adopted = ([name for name in record.get(origin, []) if name in settings] for origin in ("given", "adopted"))
    rest = [name for name in settings if name not in {*given, *adopted} and settings[name] not in (None, "")]
    shown = "<h2>Settings</h2>"
    for title, names in (("given", given), ("taken over from the checkpoint", adopted)):
        if names:
            shown += table([title], [(name, [settings[name]]) for name in names])
    return (
        shown + f"<details><summary>defaults</summary>"
        f"{table(['default'], [(name, [settings[name]]) for name in rest])}</details>"
    )


def _surroundings(record: Mapping[str, Any]) -> str:
    if "environment" not in record:
        return ""
    data = record.get("data", {})
    prints = data.items() if isinstance(data, dict) else [("data", data)]
    rows = [(name, [value]) for name, value in record["environment"].items()]
    rows += [(f"fingerprint, {name}", [value]) for name, value in prints]
    rows += [
        (f"earlier start {i + 1}", [start.get("started", "?")])
        for i, start in enumerate(record.get("earlier_starts", []))
    ]
    return "<h2>Versions, device, data</h2>" + table([""], rows)


def _files(folder: Path) -> str:
    rows = [(name, [text]) for name, text in FILES.items() if (folder / name).exists()]
    numbered = sorted(path.name for path in folder.glob("checkpoint[0-9]*.pth"))
    rows += [(name, [f"after epoch {int(name[10:-4]) + 1}"]) for name in numbered if name[10:-4].isdigit()]
    return f"<h2>Files of this folder</h2>{table(['what'], rows)}" if rows else ""


def commands(folder: Path, record: Mapping[str, Any]) -> dict[str, list[str]]:
    """What can be done with a run: title -> words of a command, to be typed in the project's folder."""
    settings, environment = record["settings"], record.get("environment", {})
    script, place = settings.get("script", FINETUNE), str(folder)
    processes = str(environment.get("processes", "1"))
    launcher = ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]
    found = {
        "go on, after an interruption or with more --epochs": [
            *launcher,
            script,
            "--resume",
            "auto",
            "--output_dir",
            place,
        ]
    }
    if script == PRETRAIN:
        checkpoint = str(folder / "checkpoint.pth")
        found["fine-tune from it"] = [
            "python",
            FINETUNE,
            "--pretrain",
            checkpoint,
            "--coco_path",
            "COCO",
            "--output_dir",
            f"{place}_finetuned",
        ]
    else:
        best = folder / "checkpoint_best.pth"
        best = str(best if best.exists() else folder / "checkpoint.pth")
        found["evaluate"] = ["python", FINETUNE, "--resume", best, "--eval", "--output_dir", f"{place}_eval"]
    found["compare with another run"] = [
        "python",
        "tools/compare_runs.py",
        place,
        "OTHER_RUN",
        "--output",
        f"{place}_compared",
    ]
    return found


def _commands(folder: Path, training: Mapping[str, Any]) -> str:
    if "settings" not in training:
        return ""
    shown = [
        f"<p>To {title}:</p><pre>{html.escape(shlex.join(words))}</pre>"
        for title, words in commands(folder, training).items()
    ]
    return (
        f'<h2>Commands</h2><p class="note">In the project\'s folder, with its environment active.</p>{"".join(shown)}'
    )
