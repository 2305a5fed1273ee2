"""Trains, fine-tunes or evaluates a detector with labels.

    python finetune_main.py --coco_path COCO --pretrain outputs/pretrain/checkpoint.pth --output_dir outputs/finetune
    python finetune_main.py --coco_path COCO --resume outputs/finetune/checkpoint.pth --eval

`python finetune_main.py --help` lists every flag.
"""

import os

# Before PyTorch is imported: threads that spin while they wait would starve the dataloader workers on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

import trainer
from datasets import build_labelled, build_loader
from datasets.labelled import few_shot, subsets
from datasets.labelled.checks import check_at_start
from datasets.sample import SampleDataset
from evaluation import Evaluation
from models import build_model
from util.checkpoints.checkpoint import BEST, LATEST, Checkpoint
from util.checkpoints.classes import classes_of
from util.checkpoints.loading import load_exactly, load_pretrained
from util.distributed import is_main_process
from util.files import write_text
from util.logger import log
from util.runs.folder import check_room, describe_settings, prepare_output, save_settings
from util.runs.model_summary import describe_model
from util.runs.page import report
from util.runs.session import run_script, start_session
from util.settings import FINETUNE, Parser, Settings, make_parser
from visualization import draw_samples


def get_args_parser() -> Parser:
    """Every flag of fine-tuning and evaluation, without `--help`, so that it can be a parent of another parser."""
    return make_parser(FINETUNE)


def parse(argv: list[str]) -> Namespace:
    return Parser(
        FINETUNE, parents=[get_args_parser()], description=__doc__.splitlines()[0]
    ).parse_args(argv)


def load_weights(
    model: torch.nn.Module,
    checkpoint: Checkpoint | None,
    settings: Settings,
    class_names: dict[int, str],
) -> None:
    """All weights of a checkpoint that is resumed or evaluated; of one to start from what fits, with a table of it."""
    if checkpoint and settings.pretrain:
        log.info(load_pretrained(model, checkpoint, class_names).table())
    elif checkpoint:
        load_exactly(model, checkpoint)


def warn_of_other_classes(trained: dict[int, str], evaluated: dict[int, str]) -> None:
    """A detector that is evaluated on data whose ids mean something else gets numbers, but not what they say."""
    differing = [label for label, name in evaluated.items() if trained.get(label, name) != name]
    if differing:
        label = differing[0]
        log.warning(
            "class %d is '%s' in the checkpoint and '%s' in the data (%d ids differ): AP will mean little",
            label,
            trained[label],
            evaluated[label],
            len(differing),
        )


def evaluate(evaluation: Evaluation, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Once, of a trained detector."""
    warn_of_other_classes(checkpoint.class_names, evaluation.dataset.class_names)
    log.info("evaluating on %d images", len(evaluation.dataset))
    evaluation(model, checkpoint.epoch or 0)
    report(evaluation.folder)


def checkpoint_extras(settings: Settings, train_set: SampleDataset) -> dict[str, Any]:
    """What the checkpoints of a run hold besides its state: its settings, and what the rows of the class head mean."""
    return {
        "args": {**settings.as_dict(), "num_classes": train_set.num_classes},
        "class_names": {int(label): name for label, name in train_set.class_names.items()},
        "category_ids": train_set.category_ids,
    }


def save_subset(folder: Path | None, train_set: SampleDataset, settings: Settings) -> None:
    """What a run with few labels learns from, so that another can take the same by `--split_file` or
    `--few_shot_file`.
    """
    annotations = getattr(train_set, "annotations", None)
    if folder is not None and is_main_process() and annotations is not None and annotations.drawn:
        few = (
            few_shot.describe_part(annotations, settings, train_set.category_ids)
            if settings.few_shot
            else None
        )
        write_text(
            folder / subsets.FILE, json.dumps(few or subsets.describe_subset(annotations, settings))
        )


def train(run: trainer.Run) -> None:
    """All epochs, with the run's page kept up to date; says at the end what the detector is good for."""
    run.on_epoch_end = lambda: report(run.folder)
    run.on_epoch_end()
    trainer.fit(run)
    if run.folder is not None:
        best = run.folder / BEST
        log.info(
            "finished; detect objects in other images: python tools/predict.py --checkpoint %s --images DIR "
            "--output_dir predictions",
            best if best.exists() else run.folder / LATEST,
        )


def main(args: Namespace) -> None:
    session = start_session(args)
    settings, checkpoint, device = session.settings, session.checkpoint, session.device
    folder = prepare_output(settings)
    train_set, val_set = build_labelled(
        settings, classes_of(checkpoint) if checkpoint and settings.resume else None
    )
    from_data = {"num_classes": val_set.num_classes}
    describe_settings(settings, from_data)
    loader = build_loader(train_set, settings, train=True) if train_set is not None else None
    sets = {
        name: images
        for name, images in (("train", train_set), ("val", val_set))
        if images is not None
    }
    facts: dict[str, Any] = {
        "data": {name: images.fingerprint() for name, images in sets.items()},
        "data_check": check_at_start(train_set, val_set, settings),
    }

    model, criterion, postprocessors = build_model(settings, val_set.num_classes)
    load_weights(model, checkpoint, settings, val_set.class_names)
    model.to(device).to(memory_format=torch.channels_last)
    criterion.to(device)
    facts["model"] = describe_model(model, settings)
    check_room(folder, model)

    evaluation = Evaluation(
        settings, val_set, criterion, postprocessors, device=device, folder=folder
    )
    if train_set is None or loader is None:
        assert checkpoint is not None  # --eval comes with --resume or --pretrain
        save_settings(folder, settings, facts, from_data)
        evaluate(evaluation, model, checkpoint)
        return
    log.info("%d training and %d validation images", len(train_set), len(val_set))
    extras = checkpoint_extras(settings, train_set)
    run = trainer.make_run(
        settings, model, criterion, loader, device, folder=folder, checkpoint_extras=extras
    )
    if checkpoint is not None and settings.resume:
        trainer.continue_run(run, checkpoint)
    del checkpoint, session  # its tensors are in the model and the optimizer now
    if settings.dry_run:
        trainer.dry_run(run)
        return
    save_settings(folder, settings, {**facts, "images": [len(train_set), len(val_set)]}, from_data)
    save_subset(folder, train_set, settings)
    draw_samples(folder, train_set, settings.batch_size, run.epoch, run.normalization)
    run.evaluate, run.eval_every = evaluation, settings.eval_every
    train(run)


if __name__ == "__main__":
    run_script(main, parse)
