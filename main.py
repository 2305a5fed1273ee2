"""Pre-trains a detector without labels.

    python main.py --imagenet_path IMAGES --output_dir outputs/pretrain --detector conditional_detr

`python main.py --help` lists every flag; `finetune_main.py --pretrain outputs/pretrain/checkpoint.pth` continues with
labels.
"""

import os

# Before PyTorch is imported: threads that spin while they wait would starve the dataloader workers on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from argparse import Namespace
from typing import Any

import torch

import trainer
from datasets import build_dataset, build_loader
from datasets.labelled.checks import check_at_start
from datasets.sample import SampleDataset
from evaluation import (
    PROPOSAL_FILES,
    ClassAgnosticEvaluation,
    evaluate_proposals_of,
    validation_settings,
)
from models import build_model
from predictor import Predictor, object_label
from util.checkpoints.checkpoint import LATEST
from util.checkpoints.loading import load_exactly
from util.distributed import is_main_process, unwrap_model
from util.errors import UserError
from util.files import make_folder
from util.logger import log
from util.runs.folder import check_room, describe_settings, prepare_output, save_settings
from util.runs.model_summary import describe_model
from util.runs.page import report
from util.runs.session import run_script, start_session
from util.settings import PRETRAIN, Parser, Settings, check_right_script, make_parser
from visualization import draw_found_patches, draw_objects, draw_samples

OBJECTS = "objects.png"


def get_args_parser() -> Parser:
    """Every flag of pre-training, without `--help`, so that it can be a parent of another parser."""
    return make_parser(PRETRAIN)


def parse(argv: list[str]) -> Namespace:
    check_right_script(argv)
    return Parser(
        PRETRAIN, parents=[get_args_parser()], description=__doc__.splitlines()[0]
    ).parse_args(argv)


def evaluate(args: Namespace) -> None:
    """Boxes of the pre-trained model against the objects of validation images, whatever their class, as DETReg does on
    COCO: with `--eval` in metrics, with `--viz` in pictures.
    """
    if not args.resume:
        raise UserError(
            f"--{'eval' if args.eval else 'viz'} needs the model to evaluate: add --resume PATH"
        )
    if args.viz and not args.output_dir:
        raise UserError("--viz: give --output_dir DIR for the pictures")
    names = (*(PROPOSAL_FILES if args.eval else ()), *([OBJECTS] if args.viz else []))
    folder = make_folder(args.output_dir, names, args.overwrite) if args.output_dir else None
    session = start_session(args)
    settings, validation = session.settings, validation_settings(session.settings)
    assert session.checkpoint is not None  # `check_checkpoints` refuses an evaluation without one
    predictor = Predictor.from_checkpoint(
        session.checkpoint,
        device=str(session.device),
        amp=validation.amp,
        image_size=validation.image_size,
        max_size=validation.max_size,
        class_agnostic=True,
    )
    if args.eval:
        evaluate_proposals_of(predictor, validation, folder)
    if folder is not None and args.viz and is_main_process():
        path = draw_objects(predictor, settings, folder / OBJECTS, labelled=validation)
        log.info("proposals, predicted and ground-truth boxes: %s", path)


def warn_of_unpublished_pretext(settings: Settings) -> None:
    """UP-DETR publishes its pre-training with flags that are off by default, there as here."""
    if settings.pretext != "random_query_patch" or settings.reproduce_published:
        return
    published = (
        ("pre_norm", "feature_recon", "fre_cnn")
        if settings.detector == "detr"
        else ("feature_recon", "fre_cnn")
    )
    missing = [f"--{name}" for name in published if not getattr(settings, name)]
    if missing:
        log.warning(
            "UP-DETR's published pre-training also has %s: add them to repeat it", " ".join(missing)
        )


def train(run: trainer.Run, dataset: SampleDataset, settings: Settings) -> None:
    """All epochs, with pages of samples and of the run; says at the end what the model is good for."""
    draw_samples(run.folder, dataset, settings.batch_size, run.epoch, run.normalization)
    report(run.folder)

    def on_epoch_end() -> None:
        draw_found_patches(
            run.folder, unwrap_model(run.model), dataset, run.normalization, run.device
        )
        report(run.folder)

    run.on_epoch_end = on_epoch_end
    trainer.fit(run)
    if run.folder is not None:
        log.info(
            "finished; fine-tune with: python finetune_main.py --detector %s --coco_path COCO --pretrain %s",
            settings.detector,
            run.folder / LATEST,
        )


def class_agnostic_evaluation(settings: Settings, device: torch.device) -> ClassAgnosticEvaluation:
    """The metrics of `--eval_every`, on the validation images of the dataset that is pre-trained on."""
    validation = validation_settings(settings)
    dataset = build_dataset("val", validation, any_class_count=True)
    label = object_label(settings.num_classes)
    return ClassAgnosticEvaluation(validation, dataset, label=label, device=device)


def main(args: Namespace) -> None:
    if args.eval or args.viz:
        evaluate(args)
        return
    session = start_session(args)
    settings, checkpoint, device = session.settings, session.checkpoint, session.device
    folder = prepare_output(settings)
    describe_settings(settings)
    warn_of_unpublished_pretext(settings)

    dataset = build_dataset("train", settings)
    loader = build_loader(dataset, settings, train=True)
    facts: dict[str, Any] = {
        "data": dataset.fingerprint(),
        "images": len(dataset),
        "data_check": check_at_start(dataset, None, settings),
    }
    model, criterion, _ = build_model(settings)
    if checkpoint:
        load_exactly(model, checkpoint)
        model.load_frozen(checkpoint.frozen or {}, checkpoint.source)
    model.to(device).to(memory_format=torch.channels_last)
    criterion.to(device)
    facts["model"] = describe_model(model, settings)
    check_room(folder, model)

    extras = {"args": settings.as_dict()}
    run = trainer.make_run(
        settings, model, criterion, loader, device, folder=folder, checkpoint_extras=extras
    )
    if settings.eval_every:
        run.evaluate, run.eval_every = (
            class_agnostic_evaluation(settings, device),
            settings.eval_every,
        )
    if checkpoint:
        trainer.continue_run(run, checkpoint)
    del checkpoint, session  # its tensors are in the model and the optimizer now
    if settings.dry_run:
        trainer.dry_run(run)
        return
    save_settings(folder, settings, facts)
    train(run, dataset, settings)


if __name__ == "__main__":
    run_script(main, parse)
