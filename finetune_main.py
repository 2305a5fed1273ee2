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

import engine
from datasets import build_labelled, build_loader
from datasets.evaluators.per_class import class_table
from datasets.labelled import few_shot, subsets
from datasets.labelled.checks import check_at_start
from datasets.sample_page import draw_samples
from models import build_model
from util.box_ops import box_cxcywh_to_xyxy
from util.checkpoints.checkpoint import Checkpoint, load_exactly, load_pretrained
from util.checkpoints.classes import classes_of
from util.distributed import is_main_process
from util.files import write_text
from util.logger import log
from util.plots.pages import prediction_page
from util.runs.folder import check_room, describe_settings, prepare_output, save_settings
from util.runs.model_summary import describe_model
from util.runs.page import report
from util.runs.session import prepare_checkpoint, run_script, seed_everything, start_session
from util.settings.arguments import Parser, make_parser, plain_settings
from util.settings.flags import FINETUNE

METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP small",
    "AP medium",
    "AP large",
    "AR1",
    "AR10",
    "AR100",
    "AR small",
    "AR medium",
    "AR large",
)


def get_args_parser() -> Parser:
    """Every flag of fine-tuning and evaluation, without `--help`, so that it can be a parent of another parser."""
    return make_parser(FINETUNE)


def parse(argv: list[str]) -> Namespace:
    return Parser("finetune_main.py", parents=[get_args_parser()], description=__doc__.splitlines()[0]).parse_args(argv)


class Evaluation:
    """Evaluates on the held-out images; leaves `metrics.json`, `per_class.json`, `results.json` and a page of
    predictions in the run's folder."""

    def __init__(
        self,
        args: Namespace,
        dataset,
        criterion,
        postprocessors: dict,
        device: torch.device,
        folder: Path | None,
        normalization: dict,
    ) -> None:
        self.args, self.dataset, self.criterion, self.postprocessors = args, dataset, criterion, postprocessors
        self.device, self.folder, self.normalization = device, folder, normalization
        self.loader = build_loader(dataset, args, train=False)
        self.novel = few_shot.novel_names(args, dataset.class_names) if args.few_shot else None

    def __call__(self, model: torch.nn.Module, epoch: int) -> dict:
        """Returns the values for the log, with the prefix `test_`."""
        evaluator = self.dataset.evaluator(self.args)
        values, examples = engine.evaluate(
            model,
            self.criterion,
            self.postprocessors,
            self.loader,
            evaluator,
            self.device,
            self.normalization,
            self.args.amp == "bf16",
            keep_examples=12,
        )
        per_class = values.pop("per_class")
        shown = [f"{name} {value:.3f}" for name, value in zip(METRICS, values["coco_eval_bbox"], strict=False)]
        recalls = f"\n{'  '.join(shown[6:])}" if shown[6:] else ""
        table = class_table(per_class)
        if self.novel is not None:
            per_class = few_shot.with_groups(per_class, self.novel)
            values["few_shot"] = few_shot.group_means(per_class)
            table += "\n" + few_shot.group_table(per_class, values["few_shot"])
        log.info("%s  loss %.3f%s\n%s", "  ".join(shown[:6]), values["loss"], recalls, table)
        if self.folder is not None and is_main_process():
            write_text(self.folder / "results.json", json.dumps(evaluator.results()))
            write_text(self.folder / "metrics.json", json.dumps({"epoch": epoch, **values}, indent=1))
            write_text(self.folder / "per_class.json", json.dumps({"epoch": epoch, "classes": per_class}, indent=1))
            prediction_page(
                [_page_row(example) for example in examples], self.dataset.class_names, self.folder / "predictions.png"
            )
        return {f"test_{name}": value for name, value in values.items()}


def _page_row(example: dict) -> tuple:
    """(image, predictions, truth) of one example, boxes in pixels of the image."""
    image = example["image"]
    height, width = image.shape[1:]
    truth = box_cxcywh_to_xyxy(example["boxes_cxcywh"]) * torch.tensor([width, height, width, height])
    return image.permute(1, 2, 0).numpy(), example["predictions"], {"boxes": truth, "labels": example["labels"]}


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


def kept_with_weights(args: Namespace, train_set, normalization: dict) -> dict:
    """What the checkpoints of a run hold beside its state."""
    return {
        "args": plain_settings(args),
        "normalization": normalization,
        "class_names": {int(label): name for label, name in train_set.class_names.items()},
        "category_ids": train_set.category_ids,
        "version": engine.CHECKPOINT_VERSION,
    }


def train(run: engine.Run) -> None:
    """All epochs, with the run's page kept up to date; says at the end what the detector is good for."""
    run.plot = lambda: report(run.folder)
    run.plot()
    engine.fit(run)
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
    evaluation = Evaluation(args, val_set, criterion, postprocessors, device, folder, normalization)
    if args.eval:
        save_settings(folder, args, facts)
        evaluate(evaluation, model, checkpoint)
        return
    log.info("%d training and %d validation images", len(train_set), len(val_set))
    run = engine.make_run(
        args, model, criterion, loader, device, folder, kept_with_weights(args, train_set, normalization)
    )
    if args.resume:
        engine.continue_run(run, checkpoint)
    del checkpoint  # its tensors are in the model and the optimiser now
    if args.dry_run:
        engine.dry_run(run)
        return
    save_settings(folder, args, {**facts, "images": [len(train_set), len(val_set)]})
    save_subset(folder, train_set, args)
    draw_samples(folder, train_set, args.batch_size, run.epoch, normalization)
    run.evaluate, run.eval_every = evaluation, args.eval_every
    train(run)


if __name__ == "__main__":
    run_script(main, parse)
