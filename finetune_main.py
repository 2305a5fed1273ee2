"""Train, fine-tune or evaluate a DETR detector with labels.

    python finetune_main.py --coco_path COCO --pretrain outputs/pretrain/checkpoint.pth --output_dir outputs/finetune
    python finetune_main.py --coco_path COCO --resume outputs/finetune/checkpoint.pth --eval

`python finetune_main.py --help` lists all flags.
"""

from util.environment import check_environment

check_environment()  # before what an old Python or PyTorch can't import

from util.settings import FINETUNE, print_help

if __name__ == "__main__":
    print_help(FINETUNE, __doc__)  # before the imports below, which take seconds

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

import trainer
from datasets import build_labelled, build_loader, check_batch_size
from datasets.labelled import few_shot, subsets
from datasets.labelled.checks.startup import run_startup_checks
from datasets.sample import SampleDataset
from evaluation import Evaluation
from memory import plan_memory
from models import build_model
from models.segmentation import SegmentationDetector
from util.checkpoints.checkpoint import BEST, LATEST, Checkpoint
from util.checkpoints.classes import Classes, infer_classes
from util.checkpoints.loading import load_pretrained, load_strict, without_mask_head
from util.distributed import is_main_process
from util.files import write_text
from util.logger import log
from util.runs.compilation import compile_detector
from util.runs.folder import check_disk_space, log_settings, prepare_output_dir, save_settings
from util.runs.model_summary import log_model_summary
from util.runs.page import update_run_page
from util.runs.session import run_script, start_session
from util.settings import Parser, Settings, full_parser, make_parser
from visualization import draw_samples


def get_args_parser() -> Parser:
    """Return the parser of all training and evaluation flags, without `--help`: it can be the parent of another."""
    return make_parser(FINETUNE)


def parse(argv: list[str]) -> Namespace:
    return full_parser(FINETUNE, __doc__).parse_args(argv)


def load_weights(
    model: torch.nn.Module,
    checkpoint: Checkpoint | None,
    settings: Settings,
    class_names: dict[int, str],
) -> None:
    """Load all weights of `--resume`, those of `--pretrain` that fit, with a table of what was loaded, or the detector
    of `--frozen_weights`.
    """
    if not checkpoint:
        return
    if settings.pretrain:
        log.info(load_pretrained(model, checkpoint, class_names).table())
    elif settings.resume or not isinstance(model, SegmentationDetector):
        load_strict(model, checkpoint)
    else:
        load_strict(model.detr, without_mask_head(checkpoint))


def warn_class_mismatch(trained: dict[int, str], evaluated: dict[int, str]) -> None:
    """Warn if class ids have other names in the data than in training: AP is computed, but compares other classes."""
    differing = [label for label, name in evaluated.items() if trained.get(label, name) != name]
    if differing:
        label = differing[0]
        log.warning(
            "class %d is '%s' in the checkpoint and '%s' in the data (%d class ids differ): AP is not meaningful",
            label,
            trained[label],
            evaluated[label],
            len(differing),
        )


def warn_nameless_rows(classes: Classes, dataset: SampleDataset) -> None:
    """Warn if a class head without names has other rows than the data has labels, so that its classes are a guess.

    With `category_ids` the classes were matched, see datasets/labelled/custom.py; in COCO's layout rows are ids.
    """
    names = dataset.class_names
    numbers_itself = bool(names) and min(names) == 0 and dataset.category_ids is None
    # Published heads for VOC have one row more than classes.
    if classes.named or not numbers_itself or classes.num_classes <= len(names) + 1:
        return
    log.warning(
        "%s has no class names and %d rows, the data have %d classes: row 0 is taken to be '%s' and so on; if it was "
        "trained on other classes, AP is not meaningful",
        classes.source,
        classes.num_classes,
        len(names),
        names[0],
    )


def evaluate(evaluation: Evaluation, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Evaluate a trained detector once (`--eval`)."""
    classes = infer_classes(checkpoint)
    warn_class_mismatch(classes.names if classes.named else {}, evaluation.dataset.class_names)
    warn_nameless_rows(classes, evaluation.dataset)
    log.info("evaluating on %d images", len(evaluation.dataset))
    evaluation(model, checkpoint.epoch or 0)
    update_run_page(evaluation.folder)
    if evaluation.folder is not None:
        what = "metrics, detections" if evaluation.has_metrics else "detections (results.json)"
        log.info("%s and result.html are in %s", what, evaluation.folder)


def checkpoint_extras(
    settings: Settings, train_set: SampleDataset, exif_found: str | None = None
) -> dict[str, Any]:
    """Return what checkpoints contain besides the training state: settings and the meaning of the class head.

    Args:
        exif_found: how the training images are used if they have an EXIF orientation, for inference.
    """
    exif = {"exif_of_training": exif_found} if exif_found else {}
    return {
        "args": {**settings.as_dict(), **exif, "num_classes": train_set.num_classes},
        "class_names": {int(label): name for label, name in train_set.class_names.items()},
        "category_ids": train_set.category_ids,
        "things": train_set.things,
    }


def save_subset(folder: Path | None, train_set: SampleDataset, settings: Settings) -> None:
    """Save which images or objects were drawn for a run on few labels.

    Another run can use the same ones by `--split_file` or `--few_shot_file`.
    """
    annotations = getattr(train_set, "annotations", None)
    if annotations is None or not annotations.subset:
        return  # trained on everything
    if folder is None or not is_main_process():
        return
    if settings.few_shot:
        record = few_shot.few_shot_record(annotations, settings, train_set.category_ids)
    else:
        record = subsets.subset_record(annotations, settings)
    write_text(folder / subsets.SUBSET_FILE, json.dumps(record))


def train(run: trainer.Run) -> None:
    """Train all epochs, keep the run's page up to date, and log the command for inference."""
    run.on_epoch_end = lambda: update_run_page(run.folder)
    run.on_epoch_end()
    trainer.fit(run)
    if run.folder is not None:
        best, latest = run.folder / BEST, run.folder / LATEST
        log.info(
            "finished; checkpoints, curves and result.html are in %s\n"
            "to detect objects: python tools/predict.py --checkpoint %s --images DIR --output_dir predictions",
            run.folder,
            best if best.exists() else latest,
        )


def main(args: Namespace) -> None:
    session = start_session(args)
    settings, checkpoint, device = session.settings, session.checkpoint, session.device
    folder = prepare_output_dir(settings)

    # A resumed run keeps the meaning of its class head, also if the annotations list classes in another order.
    # So does a frozen detector.
    keeps_classes = settings.resume or settings.frozen_weights
    classes = infer_classes(checkpoint) if (checkpoint and keeps_classes) else None
    train_set, val_set = build_labelled(settings, classes)
    from_data = {"num_classes": val_set.num_classes}
    log_settings(settings, from_data)

    datasets = {"val": val_set}
    if train_set is not None:  # None with --eval
        check_batch_size(train_set, settings)
        datasets = {"train": train_set, "val": val_set}
    record: dict[str, Any] = {  # for args.json
        "data": {name: dataset.fingerprint() for name, dataset in datasets.items()},
        "data_check": run_startup_checks(train_set, val_set, settings),
    }

    model, criterion, postprocessors = build_model(settings, val_set.num_classes, val_set.things)
    load_weights(model, checkpoint, settings, val_set.class_names)
    model.to(device).to(memory_format=torch.channels_last)
    criterion.to(device)
    record["model"] = log_model_summary(model, settings)
    check_disk_space(folder, model)

    if train_set is not None:
        settings = plan_memory(
            settings, model, criterion, train_set, device, session.auto_batch_size
        )
    evaluation = Evaluation(
        settings, val_set, criterion, postprocessors, device=device, folder=folder
    )
    if train_set is None:
        assert checkpoint is not None  # settings refuse --eval without --resume or --pretrain
        save_settings(folder, settings, record, from_data)
        compile_detector(model, settings.compile)
        evaluate(evaluation, model, checkpoint)
        return

    log.info("%d training and %d validation images", len(train_set), len(val_set))
    extras = {
        **checkpoint_extras(settings, train_set, record["data_check"].get("exif")),
        "data_fingerprint": record["data"],
    }
    loader = build_loader(train_set, settings, train=True)
    run = trainer.build_run(
        settings, model, criterion, loader, device, folder=folder, checkpoint_extras=extras
    )
    if checkpoint is not None and settings.resume:
        trainer.resume_run(run, checkpoint)
    del checkpoint, session  # frees the memory of its tensors: model and optimizer have them now

    if settings.dry_run:
        trainer.dry_run(run)
        return
    save_settings(folder, settings, {**record, "images": [len(train_set), len(val_set)]}, from_data)
    save_subset(folder, train_set, settings)
    draw_samples(folder, train_set, settings.batch_size, run.epoch, run.normalization)
    run.evaluate, run.eval_every = evaluation, settings.eval_every
    train(run)


if __name__ == "__main__":
    run_script(main, parse)
