"""Trains, fine-tunes or evaluates a detector with labels.

    python finetune_main.py --coco_path COCO --pretrain outputs/pretrain/checkpoint.pth --output_dir outputs/finetune
    python finetune_main.py --coco_path COCO --resume outputs/finetune/checkpoint.pth --eval

`python finetune_main.py --help` lists every flag.
"""

import os

# Before PyTorch is imported: threads that spin while they wait would starve the loader processes on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
from argparse import Namespace
from pathlib import Path

import torch

import trainer
from datasets import build_labelled, build_loader
from datasets.labelled import few_shot, subsets
from datasets.labelled.checks import check_at_start
from datasets.sample_page import draw_samples
from evaluation import Evaluation
from models import build_model
from util.checkpoints.checkpoint import Checkpoint, load_exactly, load_pretrained
from util.checkpoints.classes import classes_of
from util.distributed import is_main_process
from util.files import write_text
from util.logger import log
from util.runs.folder import check_room, describe_settings, prepare_output, save_settings
from util.runs.model_summary import describe_model
from util.runs.page import report
from util.runs.session import prepare_checkpoint, run_script, seed_everything, start_session
from util.settings.arguments import Parser, make_parser, plain_settings
from util.settings.flags import FINETUNE


def get_args_parser() -> Parser:
    """Every flag of fine-tuning and evaluation, without `--help`, so that it can be a parent of another parser."""
    return make_parser(FINETUNE)


def parse(argv: list[str]) -> Namespace:
    return Parser("finetune_main.py", parents=[get_args_parser()], description=__doc__.splitlines()[0]).parse_args(argv)


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


def load_weights(
    model: torch.nn.Module, checkpoint: Checkpoint | None, args: Namespace, class_names: dict[int, str]
) -> None:
    """All of a checkpoint that goes on; of one that is only a start what fits, with a table of what that was."""
    if args.pretrain:
        log.info(load_pretrained(model, checkpoint, class_names).table())
    elif checkpoint:
        load_exactly(model, checkpoint)


def save_subset(folder: Path | None, train_set, args: Namespace) -> None:
    """What a run with few labels learns from, so that another can take the same by `--split_file` or
    `--few_shot_file`.
    """
    annotations = getattr(train_set, "annotations", None)
    if folder is not None and is_main_process() and annotations is not None and annotations.drawn:
        few = few_shot.describe_part(annotations, args, train_set.category_ids) if args.few_shot else None
        write_text(folder / subsets.FILE, json.dumps(few or subsets.describe_subset(annotations, args)))


def evaluate(evaluation: Evaluation, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Once, of a trained detector."""
    warn_of_other_classes(checkpoint.get("class_names") or {}, evaluation.dataset.class_names)
    log.info("evaluating on %d images", len(evaluation.dataset))
    evaluation(model, checkpoint.get("epoch", 0))
    report(evaluation.folder)


def checkpoint_extras(args: Namespace, train_set, normalization: dict) -> dict:
    """What the checkpoints of a run hold beside its state."""
    return {
        "args": plain_settings(args),
        "normalization": normalization,
        "class_names": {int(label): name for label, name in train_set.class_names.items()},
        "category_ids": train_set.category_ids,
        "version": trainer.CHECKPOINT_VERSION,
    }


def train(run: trainer.Run) -> None:
    """All epochs, with the run's page kept up to date; says at the end what the detector is good for."""
    run.on_epoch_end = lambda: report(run.folder)
    run.on_epoch_end()
    trainer.fit(run)
    if run.folder is not None:
        best = run.folder / "checkpoint_best.pth"
        log.info(
            "finished; objects on other images: python tools/predict.py --checkpoint %s --images DIR --output_dir "
            "predictions",
            best if best.exists() else run.folder / "checkpoint.pth",
        )


def main(args: Namespace) -> None:
    device = start_session(args)
    checkpoint = prepare_checkpoint(args)
    seed_everything(args.seed)
    folder = prepare_output(args)
    train_set, val_set = build_labelled(args, classes_of(checkpoint) if args.resume else None)
    describe_settings(args)
    loader = None if args.eval else build_loader(train_set, args, train=True)
    facts = {
        "data": {
            name: images.fingerprint()
            for name, images in (("train", train_set), ("val", val_set))
            if images is not None
        },
        "data_check": check_at_start(train_set, val_set, args),
    }

    model, criterion, postprocessors = build_model(args)
    load_weights(model, checkpoint, args, val_set.class_names)
    model.to(device, memory_format=torch.channels_last)
    criterion.to(device)
    facts["model"] = describe_model(model, args)
    check_room(folder, model)

    backbone = model.backbone[0]
    normalization = {"mean": list(backbone.mean), "std": list(backbone.std)}
    evaluation = Evaluation(
        args, val_set, criterion, postprocessors, device=device, folder=folder, normalization=normalization
    )
    if args.eval:
        save_settings(folder, args, facts)
        evaluate(evaluation, model, checkpoint)
        return
    log.info("%d training and %d validation images", len(train_set), len(val_set))
    extras = checkpoint_extras(args, train_set, normalization)
    run = trainer.make_run(args, model, criterion, loader, device, folder=folder, checkpoint_extras=extras)
    if args.resume:
        trainer.continue_run(run, checkpoint)
    del checkpoint  # its tensors are in the model and the optimiser now
    if args.dry_run:
        trainer.dry_run(run)
        return
    save_settings(folder, args, {**facts, "images": [len(train_set), len(val_set)]})
    save_subset(folder, train_set, args)
    draw_samples(folder, train_set, args.batch_size, run.epoch, normalization)
    run.evaluate, run.eval_every = evaluation, args.eval_every
    train(run)


if __name__ == "__main__":
    run_script(main, parse)
