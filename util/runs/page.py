"""The HTML page of a run: one self-contained file, made only from the files in the run's folder.

It is written when training starts and after each epoch, so that an interrupted run has one too. The markup is in
page.html.j2.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.distributed import is_main_process
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.plots.curves import BBOX_STATS, plot_logs
from util.runs.folder import EVAL_SETTINGS, KEPT_FILES, SETTINGS, read_json_object
from util.runs.html import render
from util.runs.log import read_log
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
    "metrics.json": "metrics of the last evaluation",
    "per_class.json": "AP per class of the last evaluation",
    "results.json": "detections of the last evaluation in COCO format",
    "checkpoint.pth": "latest checkpoint of an epoch, or of a run that was stopped; --resume auto continues from it",
    "nonfinite": "batches of steps that were skipped, for tools/replay.py",
    "checkpoint_best.pth": "checkpoint of the epoch with the best AP",
}
PICTURES = (  # title, file, caption
    (
        "Training curves",
        "curves.png",
        "Losses and AP per epoch. Solid: training, dashed: validation.",
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
        "Training images",
        "samples.png",
        "As the model sees them: augmented, and padded to the size of their batch (striped). "
        "Normalization is undone for display.",
    ),
)
ENVIRONMENT_LABELS = {
    "code": "git commit",
    "cuda": "CUDA",
    "gpu": "GPU",
    "cpu_threads": "CPU threads",
}


def update_run_page(folder: Path | None) -> None:
    """Draw curves.png and write the page, on rank 0.

    A problem, such as a missing matplotlib, is logged once, and training continues.
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


# The page is written after every epoch: without this, a missing matplotlib would be logged each time.
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


def _average_precision(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Rows:
    """Return AP of the last and the best epoch, or of the evaluation in a folder without training."""
    evaluated = evaluations(entries)
    if evaluated:
        last_epoch, last_stats = evaluated[-1]
        best_epoch, best_stats = max(evaluated, key=lambda item: item[1][0])
        found = {f"last epoch ({last_epoch})": last_stats, f"best epoch ({best_epoch})": best_stats}
    else:
        stats = read_json_object(folder / "metrics.json").get("coco_eval_bbox")
        found = {"this evaluation": stats} if stats else {}
    return _decimals({name: stats[: len(BBOX_STATS)] for name, stats in found.items()})


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
