"""The page of a run: one HTML file with its pictures inside, made from the files in the run's folder alone.

It is written when training begins and after each epoch, so that an interrupted run has one too. page.html.j2 holds the
markup.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.distributed import is_main_process
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.plots.curves import BBOX_STATS, plot_logs
from util.runs.folder import EVAL_SETTINGS, SETTINGS, read_json_object
from util.runs.html import render
from util.runs.log import read_log
from util.settings import FINETUNE, PRETRAIN

PAGE = "result.html"
TEMPLATE = Path(__file__).with_name("page.html.j2")
Rows = list[tuple[str, list[Any]]]  # of a table: (name, cells) each

FILES = {
    SETTINGS: "every setting, which were given and which were adopted from a checkpoint, versions, device, fingerprint "
    "of the data, model",
    EVAL_SETTINGS: "the same for the last run with --eval",
    "subset.json": "the images, or the objects of few shots, that the run trains on, if not all",
    "log.txt": "one JSON object per epoch: train_* and test_* values (train_seconds: training time so far)",
    "curves.png": "losses and AP so far",
    "samples.png": "training images with their boxes, as the model gets them",
    "predictions.png": "predictions of the last evaluation beside the ground truth",
    "patches.png": "what the patches' queries find, after the last epoch",
    "metrics.json": "metrics of the last evaluation",
    "per_class.json": "AP of each class in it",
    "results.json": "its detections, in COCO's format",
    "checkpoint.pth": "after the last epoch, or where the run was stopped; --resume auto continues from it",
    "checkpoint_best.pth": "from the epoch with the best AP",
}
PICTURES = (  # title, file, what it shows
    ("Curves", "curves.png", "Losses and AP by epoch."),
    ("Boxes on held-out images", "predictions.png", "Predictions beside the ground truth."),
    (
        "What the patches' queries find",
        "patches.png",
        "Patches, where they were cut, and the boxes found.",
    ),
    (
        "Training images as the model gets them",
        "samples.png",
        "Augmented, padded to their batch (striped) and normalized; the normalization is undone here.",
    ),
)


def update_run_page(folder: Path | None) -> None:
    """Draws curves.png, all losses and AP of the log, and writes the page. What can't be drawn is logged once, and
    training continues.
    """
    if folder is None or not is_main_process():
        return
    try:
        if (folder / "log.txt").is_file():
            plot_logs(folder, [*loss_names(read_log(folder)), "mAP"], folder / "curves.png")
    except UserError as error:
        _warn_once("no curves", error)
    try:
        write_run_page(folder)
    except UserError as error:
        _warn_once(f"no {PAGE}", error)


def _warn_once(what: str, error: UserError) -> None:
    if (what, str(error)) not in _warned:
        _warned.add((what, str(error)))
        log.warning("%s: %s", what, error)


_warned: set[tuple[str, str]] = set()


def write_run_page(folder: Path) -> Path:
    """result.html of a folder of training or of evaluation.

    Raises:
        UserError: a damaged log, or the page can't be written.
    """
    training, evaluation = (
        read_json_object(folder / SETTINGS),
        read_json_object(folder / EVAL_SETTINGS),
    )
    record = training or evaluation
    entries = read_log(folder) if (folder / "log.txt").is_file() else []
    names = loss_names(entries)
    text = render(
        TEMPLATE,
        title=folder.resolve().name,
        summary=_summary(record),
        progress=_progress(entries, training.get("settings", {})),
        bbox_stats=BBOX_STATS,
        average_precision=_average_precision(folder, entries),
        few_shot=_decimals(read_json_object(folder / "metrics.json").get("few_shot") or {}),
        loss_names=[name.replace("_", " ") for name in names],
        losses=_losses(entries, names),
        pictures=[(title, folder / name, caption) for title, name, caption in PICTURES],
        settings=_settings_by_origin(record),
        environment=_environment(record),
        files=_files(folder),
        commands=commands(folder, training) if "settings" in training else {},
    )
    return write_text(folder / PAGE, text)


def _summary(record: Mapping[str, Any]) -> str:
    """One sentence on model, start and data."""
    settings, model, images = (record.get(key) or {} for key in ("settings", "model", "images"))
    if not settings:
        return "The settings of this run are not in its folder."
    kind = (
        f"Pre-training ({settings.get('pretext')})"
        if settings.get("script") == PRETRAIN
        else "Fine-tuning"
    )
    kind = "Evaluation" if settings.get("eval") else kind
    source = settings.get("pretrain") or settings.get("resume")
    source = f"from {source}" if source else f"backbone weights: {settings.get('backbone_weights')}"
    text = f"{kind} of {settings.get('detector')} on {settings.get('backbone')}, {source}."
    if model:
        text += f" {model['parameters']:,} parameters, {model['trainable']:,} trainable"
        height, width = model["multiply_adds_hw"]
        count = model["multiply_adds"]
        text += (
            f"; {count / 1e9:.4g} G multiply-adds for an image of {height} x {width}."
            if count
            else "."
        )
    if images:
        counts = images if isinstance(images, list) else [images]
        named = zip(counts, ("for training", "held out"), strict=False)
        text += f" Images: {', '.join(f'{count:,} {name}' for count, name in named)}."
    return text


def _progress(entries: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    if not settings and not entries:
        return ""
    done, planned = (
        (entries[-1].get("epoch", len(entries) - 1) + 1 if entries else 0),
        settings.get("epochs"),
    )
    text = f"Epochs logged: {done}" + (f" of {planned}" if planned else "")
    seconds = entries[-1].get("train_seconds") if entries else None
    return text + (f", {format_seconds(seconds)} of training." if seconds else ".")


def evaluations(entries: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[float]]]:
    """(epoch counted from 1, COCO's metrics) of each epoch that was evaluated."""
    return [
        (e.get("epoch", i) + 1, e["test_coco_eval_bbox"])
        for i, e in enumerate(entries)
        if e.get("test_coco_eval_bbox")
    ]


def loss_names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The weighted losses of the last decoder layer that a log has, `loss` (the sum over all layers) first."""
    names = [
        key.removeprefix("train_")
        for key in (entries[-1] if entries else {})
        if key.startswith("train_loss")
    ]
    names = [name for name in names if not name.endswith("_unscaled") and not name[-1].isdigit()]
    return sorted(names, key=lambda name: name != "loss")  # otherwise in the log's order


def _average_precision(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Rows:
    """Of the last and the best epoch, else of the evaluation in this folder."""
    evaluated = evaluations(entries)
    if evaluated:
        best = max(evaluated, key=lambda item: item[1][0])
        found = {
            f"last, epoch {evaluated[-1][0]}": evaluated[-1][1],
            f"best, epoch {best[0]}": best[1],
        }
    else:
        stats = read_json_object(folder / "metrics.json").get("coco_eval_bbox")
        found = {"this evaluation": stats} if stats else {}
    return _decimals({name: stats[: len(BBOX_STATS)] for name, stats in found.items()})


def _losses(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Rows:
    """Of the first and the last epoch."""
    ends = dict.fromkeys((0, len(entries) - 1)) if names else {}  # one row where there is one epoch
    return _decimals(
        {
            f"epoch {entries[i].get('epoch', i) + 1}": [entries[i].get(f"train_{n}") for n in names]
            for i in ends
        }
    )


def _decimals(values: Mapping[str, Sequence[float | None]]) -> Rows:
    return [(name, ["-" if v is None else f"{v:.3f}" for v in row]) for name, row in values.items()]


def _settings_by_origin(record: Mapping[str, Any]) -> dict[str, Rows]:
    settings = record.get("settings", {})
    given, adopted = record.get("given", []), record.get("adopted", [])
    rest = [
        name
        for name in settings
        if name not in {*given, *adopted} and settings[name] not in (None, "")
    ]
    origins = {"given": given, "adopted from the checkpoint": adopted, "default": rest}
    found = {
        origin: [(name, [settings[name]]) for name in names if name in settings]
        for origin, names in origins.items()
    }
    return found if settings else {}


def _environment(record: Mapping[str, Any]) -> Rows:
    """Versions, device and fingerprints of the data; empty for a record without them."""
    if "environment" not in record:
        return []
    data = record.get("data", {})
    rows = {
        **record["environment"],
        **{
            f"fingerprint, {name}": value
            for name, value in (data if isinstance(data, dict) else {"data": data}).items()
        },
        **{
            f"earlier start {i + 1}": e.get("started", "?")
            for i, e in enumerate(record.get("earlier_starts", []))
        },
    }
    return [(name, [value]) for name, value in rows.items()]


def _files(folder: Path) -> Rows:
    rows = [(name, [text]) for name, text in FILES.items() if (folder / name).exists()]
    numbered = sorted(path.name for path in folder.glob("checkpoint[0-9]*.pth"))
    return rows + [
        (name, [f"after epoch {int(name[10:-4]) + 1}"])
        for name in numbered
        if name[10:-4].isdigit()
    ]


def commands(folder: Path, record: Mapping[str, Any]) -> dict[str, list[str]]:
    """What can be done with a run: purpose -> words of a command, to be typed in the project's folder."""
    script, place = record["settings"].get("script", FINETUNE), str(folder)
    processes = str(record.get("environment", {}).get("processes", "1"))
    launcher = ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]
    resume = [*launcher, script, "--resume", "auto", "--output_dir", place]
    found = {"continue, after an interruption or with more --epochs": resume}

    def finetune(flags: list[str], suffix: str) -> list[str]:
        return ["python", FINETUNE, *flags, "--output_dir", f"{place}_{suffix}"]

    if script == PRETRAIN:
        checkpoint = str(folder / "checkpoint.pth")
        found["fine-tune from it"] = finetune(
            ["--pretrain", checkpoint, "--coco_path", "COCO"], "finetuned"
        )
    else:
        best = folder / "checkpoint_best.pth"
        best = best if best.exists() else folder / "checkpoint.pth"
        found["evaluate it"] = finetune(["--resume", str(best), "--eval"], "eval")
    compare = [
        "python",
        "tools/compare_runs.py",
        place,
        "OTHER_RUN",
        "--output",
        f"{place}_compared",
    ]
    return {**found, "compare it with another run": compare}
