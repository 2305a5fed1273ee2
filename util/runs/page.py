"""The HTML page of a run: one self-contained file, made only from the files in the run's folder.

It is written when training starts, after each evaluation and between them, so that an interrupted run has one too. The
markup is in page.html.j2.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.distributed import is_main_process
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.plots.curves import BBOX_STATS, plot_logs
from util.runs.folder import (
    ANALYSIS,
    BEST_IMAGES,
    EVAL_SETTINGS,
    KEPT_FILES,
    PRECISION_RECALL,
    SETTINGS,
    WANDB_RUN,
    WORST_IMAGES,
    read_json_object,
)
from util.runs.html import render
from util.runs.log import main_metric, read_log
from util.runs.page_analysis import class_bars, draw_precision_recall, read_analysis
from util.settings import FINETUNE, PRETRAIN

PAGE = "result.html"
TEMPLATE = Path(__file__).with_name("page.html.j2")
Rows = list[tuple[str, list[Any]]]  # rows of a table: (row header, cells)

FILES = {  # file -> its content
    SETTINGS: "all settings and where each comes from, versions, device, data and model",
    EVAL_SETTINGS: "settings, versions, device, data and model of the last evaluation (--eval)",
    "subset.json": "the subset of images, or of few-shot objects, that the run trains on",
    "log.txt": "one JSON object per epoch with train_* and test_* values; train_seconds is the training time so far",
    "log_steps.txt": "with --log_every: losses, learning rate and images per second of single steps",
    "curves.png": "losses and AP per epoch",
    "samples.png": "augmented training images with their boxes",
    "predictions.png": "predictions of the last evaluation next to the ground truth",
    "patches.png": "boxes predicted for query patches, after the last epoch",
    WANDB_RUN: "with --wandb: id of the W&B run, which every start continues",
    "metrics.json": "metrics of the last evaluation",
    "per_class.json": "AP per class of the last evaluation",
    ANALYSIS: "precision-recall curves, confusions, best and worst images of the last evaluation",
    PRECISION_RECALL: "precision over recall of the last evaluation",
    BEST_IMAGES: "images whose detections fit best in the last evaluation",
    WORST_IMAGES: "images whose detections fit worst in the last evaluation",
    "proposal_metrics.json": "class-agnostic metrics of the last evaluation",
    "proposals.json": "boxes of the last class-agnostic evaluation in COCO format",
    "objects.png": "proposals, predicted and ground-truth boxes (--viz)",
    "results.json": "detections of the last evaluation in COCO format",
    "checkpoint.pth": "latest checkpoint of an epoch, or of a run that was stopped; --resume auto continues from it",
    "nonfinite": "batches of steps that were skipped, for tools/replay.py",
    "checkpoint_best.pth": "checkpoint of the best epoch, by AP of boxes or masks, or panoptic quality",
}
PICTURES = (  # title, file, caption
    (
        "Best images",
        BEST_IMAGES,
        "Validation images whose detections fit best, by their F1 at the score above.",
    ),
    (
        "Worst images",
        WORST_IMAGES,
        "Validation images whose detections fit worst.",
    ),
    (
        "Predictions on validation images",
        "predictions.png",
        "Predictions of the last evaluation next to the ground truth.",
    ),
    (
        "Boxes predicted for query patches",
        "patches.png",
        "Patches, where they were cropped from, and the boxes that the model predicts for them.",
    ),
    (
        "Proposals, predicted and ground-truth boxes",
        "objects.png",
        "In each image as many boxes as it has objects; of the predicted ones those with the best scores.",
    ),
    (
        "Training images",
        "samples.png",
        "As the model sees them: augmented, and padded to the size of their batch (striped). "
        "Normalization is undone for display.",
    ),
)
EVALUATION_FIELDS = ("mAP", "mask AP", "PQ", "object_AP", "object_AR100")  # of curves.png
PANOPTIC_ROWS = {"all": "PQ_all", "things": "PQ_th", "stuff": "PQ_st"}
CLASS_METRICS = ("AP", "AP50", "mask AP")
OBJECT_METRICS = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR1000", "ARs", "ARm", "ARl")
ENVIRONMENT_LABELS = {
    "code": "git commit",
    "cuda": "CUDA",
    "gpu": "GPU",
    "cpu_threads": "CPU threads",
}


def update_run_page(folder: Path | None) -> None:
    """Draw curves.png and precision_recall.png and write the page, on rank 0.

    A problem, such as a missing matplotlib, is logged once, and training continues.
    """
    if folder is None or not is_main_process():
        return
    try:
        if (folder / "log.txt").is_file():
            names = loss_names(read_log(folder))
            plot_logs(folder, [*names, *EVALUATION_FIELDS], folder / "curves.png")
        draw_precision_recall(folder)
    except UserError as error:
        _warn_once("no curves", error)
    try:
        write_run_page(folder)
    except UserError as error:
        _warn_once(f"no {PAGE}", error)


# The page is written many times: without this, a missing matplotlib would be logged each time.
_warned: set[tuple[str, str]] = set()


def _warn_once(what: str, error: UserError) -> None:
    if (what, str(error)) not in _warned:
        _warned.add((what, str(error)))
        log.warning("%s: %s", what, error)


def write_run_page(folder: Path) -> Path:
    """Write result.html into the folder of a training run or of an evaluation.

    Raises:
        UserError: the log is damaged, or the page can't be written.
    """
    training = read_json_object(folder / SETTINGS)
    evaluation = read_json_object(folder / EVAL_SETTINGS)
    record = training or evaluation
    entries = read_log(folder) if (folder / "log.txt").is_file() else []
    names = loss_names(entries)
    text = render(
        TEMPLATE,
        title=folder.resolve().name,
        summary=_summary(record),
        progress=_progress(entries, training.get("settings", {})),
        headline=_headline(folder, entries),
        bbox_stats=BBOX_STATS,
        average_precision=_average_precision(folder, entries, "coco_eval_bbox"),
        mask_precision=_average_precision(folder, entries, "coco_eval_masks"),
        panoptic_quality=_panoptic_quality(folder, entries),
        object_metrics=OBJECT_METRICS,
        class_agnostic=_class_agnostic(folder, entries),
        few_shot=_decimals(read_json_object(folder / "metrics.json").get("few_shot") or {}),
        loss_names=[name.replace("_", " ") for name in names],
        losses=_losses(entries, names),
        curves=folder / "curves.png",
        classes=_class_bars(folder),
        analysis=read_analysis(folder),
        precision_recall=folder / PRECISION_RECALL,
        pictures=[(title, folder / name, caption) for title, name, caption in PICTURES],
        settings=_settings_by_origin(record),
        environment=_environment(record),
        files=_files(folder),
        commands=commands(folder, training) if "settings" in training else {},
    )
    return write_text(folder / PAGE, text)


def _summary(record: Mapping[str, Any]) -> str:
    """Return a sentence each on task, model and data."""
    settings, model, images = (record.get(key) or {} for key in ("settings", "model", "images"))
    if not settings:
        return f"The settings of this run are not in its folder ({SETTINGS} is missing)."

    task = "Fine-tuning"
    if settings.get("script") == PRETRAIN:
        task = f"Pre-training ({settings.get('pretext')})"
    if settings.get("eval"):
        task = "Evaluation"
    checkpoint = settings.get("pretrain") or settings.get("resume")
    source = (
        f", from {checkpoint}" if checkpoint else f" (weights: {settings.get('backbone_weights')})"
    )
    text = f"{task} of {settings.get('detector')} with backbone {settings.get('backbone')}{source}."

    if model:
        text += f" {_model_size(model)}"
    if images:
        counts = images if isinstance(images, list) else [images]
        kinds = ("training images", "validation images")
        named = [f"{count:,} {kind}" for count, kind in zip(counts, kinds, strict=False)]
        text += f" {', '.join(named)}."
    return text


def _model_size(model: Mapping[str, Any]) -> str:
    text = f"{model['parameters']:,} parameters, {model['trainable']:,} trainable"
    multiply_adds = model["multiply_adds"]
    if multiply_adds:
        height, width = model["multiply_adds_hw"]
        text += f"; {multiply_adds / 1e9:.4g} G multiply-adds for an image of {height} x {width}"
    return f"{text}."


def _progress(entries: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    if not settings and not entries:
        return ""
    finished = entries[-1].get("epoch", len(entries) - 1) + 1 if entries else 0
    planned = settings.get("epochs")
    text = f"Epochs finished: {finished}"
    if planned:
        text += f" of {planned}"

    seconds = entries[-1].get("train_seconds") if entries else None
    if seconds:
        text += f". Training time: {format_seconds(seconds)}"
    return f"{text}."


def evaluations(entries: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[float]]]:
    """Return (epoch counted from 1, COCO metrics) of each epoch with an evaluation."""
    return [
        (entry.get("epoch", i) + 1, entry["test_coco_eval_bbox"])
        for i, entry in enumerate(entries)
        if entry.get("test_coco_eval_bbox")
    ]


def loss_names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the weighted losses in a log: `loss` (the sum over all decoder layers), then those of the last layer."""
    names = [
        key.removeprefix("train_")
        for key in (entries[-1] if entries else {})
        if key.startswith("train_loss")
    ]
    # `loss_ce_0`, `loss_ce_1`, ... are the losses of the other decoder layers.
    names = [name for name in names if not name.endswith("_unscaled") and not name[-1].isdigit()]
    # Sorting is stable: all but `loss` stay in the log's order.
    return sorted(names, key=lambda name: name != "loss")


def _evaluated(entries: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return the values of `key` in the last and in the best evaluated epoch.

    The best one is that of checkpoint_best.pth, and may not be the best in this metric.
    """
    found = [
        (entry.get("epoch", i) + 1, entry) for i, entry in enumerate(entries) if entry.get(key)
    ]
    if not found:
        return {}
    last_epoch, last = found[-1]
    best_epoch, best = max(found, key=lambda item: main_metric(item[1]))
    return {f"last epoch ({last_epoch})": last[key], f"best epoch ({best_epoch})": best[key]}


def _evaluated_or_eval(folder: Path, entries: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Return `_evaluated`, or the value of the evaluation in a folder without training."""
    found = _evaluated(entries, f"test_{key}")
    value = read_json_object(folder / "metrics.json").get(key)
    return found or ({"this evaluation": value} if value else {})


def _average_precision(folder: Path, entries: Sequence[Mapping[str, Any]], key: str) -> Rows:
    found = _evaluated_or_eval(folder, entries, key)
    return _decimals({name: stats[: len(BBOX_STATS)] for name, stats in found.items()})


def _panoptic_quality(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Rows:
    """Return PQ, SQ and RQ of all classes, things and stuff."""
    rows = {}
    for title, key in PANOPTIC_ROWS.items():
        for when, values in _evaluated_or_eval(folder, entries, key).items():
            rows[f"{title}, {when}"] = [values[name] for name in ("pq", "sq", "rq")]
    return _decimals(rows)


def _class_agnostic(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Rows:
    """Return class-agnostic AP and AR of the last epoch, or of the evaluation of a pre-trained model."""
    rows: dict[str, list[float | None]] = {}
    evaluated = [entry for entry in entries if "test_object_AP" in entry]
    if evaluated:
        name = f"last evaluation (epoch {evaluated[-1].get('epoch', 0) + 1})"
        rows[name] = [evaluated[-1].get(f"test_object_{metric}") for metric in OBJECT_METRICS]
    metrics = read_json_object(folder / "proposal_metrics.json")
    if metrics:
        rows["--eval"] = [metrics.get(name) for name in OBJECT_METRICS]
        swapped = [metrics.get(f"{name}_swapped") for name in OBJECT_METRICS]
        rows["boxes of another image (baseline)"] = swapped
    return _decimals(rows)


def _class_bars(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return title -> bars of each class of the last evaluation."""
    record = read_json_object(folder / "per_class.json")
    bars = {
        "AP per class": class_bars(record.get("classes", []), CLASS_METRICS),
        "Panoptic quality per class": class_bars(record.get("panoptic", []), ("PQ",)),
    }
    return {title: rows for title, rows in bars.items() if rows}


def _headline(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the few (value, label) that people look for first."""
    found = []
    for key, label in (("PQ_all", "PQ"), ("coco_eval_masks", "mask AP"), ("coco_eval_bbox", "AP")):
        values = _evaluated_or_eval(folder, entries, key)
        if values:
            when, best = list(values.items())[-1]
            value = best["pq"] if isinstance(best, Mapping) else best[0]
            found.append((f"{value:.3f}", f"{label}, {when}"))
    boxes = _evaluated_or_eval(folder, entries, "coco_eval_bbox")
    if boxes:
        when, best = list(boxes.items())[-1]
        found.append((f"{best[1]:.3f}", f"AP50, {when}"))
    for name, cells in _class_agnostic(folder, entries)[:1]:
        found.append((cells[OBJECT_METRICS.index("AR100")], f"class-agnostic AR100, {name}"))
    if entries and entries[-1].get("train_loss") is not None:
        found.append((f"{entries[-1]['train_loss']:.3f}", "training loss, last epoch"))
    if entries and entries[-1].get("train_seconds"):
        found.append((format_seconds(entries[-1]["train_seconds"]), "training time"))
    return found


def _losses(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Rows:
    """Return the losses of the first and the last epoch."""
    if not names:
        return []
    ends = dict.fromkeys((0, len(entries) - 1))  # one row if there is only one epoch
    return _decimals(
        {
            f"epoch {entries[i].get('epoch', i) + 1}": [
                entries[i].get(f"train_{name}") for name in names
            ]
            for i in ends
        }
    )


def _decimals(values: Mapping[str, Sequence[float | None]]) -> Rows:
    return [(name, ["-" if v is None else f"{v:.3f}" for v in row]) for name, row in values.items()]


def _settings_by_origin(record: Mapping[str, Any]) -> dict[str, Rows]:
    settings = record.get("settings", {})
    if not settings:
        return {}
    given, adopted = record.get("given", []), record.get("adopted", [])
    defaults = [
        name
        for name, value in settings.items()
        if name not in {*given, *adopted} and value not in (None, "")
    ]
    origins = {"given": given, "from the checkpoint": adopted, "default": defaults}
    return {
        origin: [(name, [settings[name]]) for name in names if name in settings]
        for origin, names in origins.items()
    }


def _environment(record: Mapping[str, Any]) -> Rows:
    """Return versions, device, fingerprints of the data and earlier starts; [] for a record without them."""
    if "environment" not in record:
        return []
    rows = [
        (ENVIRONMENT_LABELS.get(name, name), [value])
        for name, value in record["environment"].items()
    ]
    data = record.get("data", {})
    fingerprints = data if isinstance(data, dict) else {"data": data}
    rows += [(f"data fingerprint, {name}", [value]) for name, value in fingerprints.items()]
    rows += [
        (f"earlier start {i}", [start.get("started", "?")])
        for i, start in enumerate(record.get("earlier_starts", []), start=1)
    ]
    return rows


def _files(folder: Path) -> Rows:
    rows = [(name, [text]) for name, text in FILES.items() if (folder / name).exists()]
    for path in sorted(folder.glob("checkpoint[0-9]*.pth")):
        epoch = path.stem.removeprefix("checkpoint")  # 0-based, as published
        if epoch.isdigit():
            rows.append((path.name, [f"checkpoint after epoch {int(epoch) + 1}"]))
    rows += [
        (path.name, ["of an earlier start of this run"])
        for name in KEPT_FILES
        for path in sorted(folder.glob(name))
    ]
    return rows


def commands(folder: Path, record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what can be done with a run: purpose -> words of a command to run in the project folder.

    COCO and OTHER_RUN are placeholders for the user to replace.
    """
    script = record["settings"].get("script", FINETUNE)
    processes = str(record.get("environment", {}).get("processes", "1"))
    launcher = ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]
    resume = [*launcher, script, "--resume", "auto", "--output_dir", str(folder)]
    found = {"resume it after an interruption, or train for more --epochs": resume}

    def finetune(flags: list[str], suffix: str) -> list[str]:
        return ["python", FINETUNE, *flags, "--output_dir", f"{folder}_{suffix}"]

    if script == PRETRAIN:
        flags = ["--pretrain", str(folder / "checkpoint.pth"), "--coco_path", "COCO"]
        found["fine-tune it"] = finetune(flags, "finetuned")
    else:
        best = folder / "checkpoint_best.pth"
        if not best.exists():  # a run without evaluation
            best = folder / "checkpoint.pth"
        found["evaluate it"] = finetune(["--resume", str(best), "--eval"], "eval")

    compare = ["python", "tools/compare_runs.py", str(folder), "OTHER_RUN"]
    return {
        **found,
        "compare it with another run": [*compare, "--output", f"{folder}_compared"],
    }
