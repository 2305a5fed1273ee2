"""Pre-train a DETR detector without labels.

    python main.py --imagenet_path IMAGES --output_dir outputs/pretrain --detector conditional_detr

`python main.py --help` lists all flags. To continue with labels:
`python finetune_main.py --coco_path COCO --pretrain outputs/pretrain/checkpoint.pth`.
"""

from util.environment import check_environment

check_environment()  # before what an old Python or PyTorch can't import

from util.settings import PRETRAIN, print_help

if __name__ == "__main__":
    print_help(PRETRAIN, __doc__)  # before the imports below, which take seconds

from argparse import Namespace
from typing import Any

import torch

import trainer
from datasets import build_dataset, build_loader, check_batch_size
from datasets.labelled.checks.startup import run_startup_checks
from datasets.sample import SampleDataset
from evaluation import (
    PROPOSAL_OUTPUTS,
    ClassAgnosticEvaluation,
    evaluate_class_agnostic,
    validation_settings,
)
from memory import plan_memory
from models import build_model
from predictor import Predictor, object_label
from util.checkpoints.checkpoint import LATEST
from util.checkpoints.loading import load_strict
from util.distributed import is_main_process, unwrap_model
from util.errors import UserError
from util.files import make_folder
from util.logger import log
from util.runs.folder import check_disk_space, log_settings, prepare_output_dir, save_settings
from util.runs.model_summary import log_model_summary
from util.runs.page import update_run_page
from util.runs.session import run_script, start_session
from util.settings import Parser, Settings, check_right_script, full_parser, make_parser
from visualization import draw_found_patches, draw_objects, draw_samples

OBJECTS_PAGE = "objects.png"


def get_args_parser() -> Parser:
    """Return the parser of all pre-training flags, without `--help`: it can be the parent of another parser."""
    return make_parser(PRETRAIN)


def parse(argv: list[str]) -> Namespace:
    check_right_script(argv)
    return full_parser(PRETRAIN, __doc__).parse_args(argv)


def evaluate(args: Namespace) -> None:
    """Evaluate a pre-trained model class-agnostically on labelled validation images, as DETReg does on COCO.

    `--eval` computes AP and AR, `--viz` draws the boxes.
    """
    if not args.resume:
        flag = "--eval" if args.eval else "--viz"
        raise UserError(f"{flag} needs the model to evaluate: add --resume PATH")
    if args.viz and not args.output_dir:
        raise UserError("--viz has no folder to write to: add --output_dir DIR")

    # Checked first, so that the user does not wait for an evaluation that can't be saved.
    folder = None
    if args.output_dir:
        outputs = PROPOSAL_OUTPUTS if args.eval else ()
        if args.viz:
            outputs = (*outputs, OBJECTS_PAGE)
        folder = make_folder(args.output_dir, outputs, args.overwrite)

    session = start_session(args)
    assert session.checkpoint is not None  # settings refuse --eval and --viz without one
    validation = validation_settings(session.settings)
    predictor = Predictor.from_checkpoint(
        session.checkpoint,
        device=str(session.device),
        amp=validation.amp,
        image_size=validation.image_size,
        max_size=validation.max_size,
        class_agnostic=True,
    )
    if args.eval:
        evaluate_class_agnostic(predictor, validation, folder)
    if args.viz and folder is not None and is_main_process():
        path = draw_objects(predictor, session.settings, folder / OBJECTS_PAGE, labelled=validation)
        log.info("proposals, predicted and ground-truth boxes drawn to %s", path)
    if (
        args.eval
    ):  # --viz alone leaves no metrics, so that a page would have nothing but its picture
        save_settings(folder, session.settings, {})
        update_run_page(folder)


def warn_missing_published_flags(settings: Settings) -> None:
    """Warn if the flags of UP-DETR's published pre-training are missing: they are off by default, there as here."""
    if settings.pretext != "random_query_patch" or settings.reproduce_published:
        return
    published = ["feature_recon", "fre_cnn"]
    if settings.detector == "detr":
        published.insert(0, "pre_norm")  # the other detectors are post-norm only
    missing = [f"--{name}" for name in published if not getattr(settings, name)]
    if missing:
        flags = " ".join(missing)
        log.warning("UP-DETR's published pre-training also has %s: add them to reproduce it", flags)


def class_agnostic_evaluation(settings: Settings, device: torch.device) -> ClassAgnosticEvaluation:
    """Return the evaluation of `--eval_every`, on the validation images of the run's dataset."""
    validation = validation_settings(settings)
    dataset = build_dataset("val", validation, allow_any_num_classes=True)
    label = object_label(settings.num_classes)
    return ClassAgnosticEvaluation(validation, dataset, label=label, device=device)


def train(run: trainer.Run, dataset: SampleDataset, settings: Settings) -> None:
    """Train all epochs, keep the pages of samples, patches and results up to date, and log the next command."""
    draw_samples(run.folder, dataset, settings.batch_size, run.epoch, run.normalization)
    update_run_page(run.folder)

    def on_epoch_end() -> None:
        model = unwrap_model(run.model)
        draw_found_patches(run.folder, model, dataset, run.normalization, run.device)
        update_run_page(run.folder)

    run.on_epoch_end = on_epoch_end
    trainer.fit(run)
    if run.folder is not None:
        log.info(
            "finished; checkpoints, curves and result.html are in %s\n"
            "to fine-tune: python finetune_main.py --detector %s --coco_path COCO --pretrain %s",
            run.folder,
            settings.detector,
            run.folder / LATEST,
        )


def main(args: Namespace) -> None:
    if args.eval or args.viz:
        evaluate(args)
        return
    session = start_session(args)
    settings, checkpoint, device = session.settings, session.checkpoint, session.device
    folder = prepare_output_dir(settings)
    log_settings(settings)
    warn_missing_published_flags(settings)

    dataset = build_dataset("train", settings)
    check_batch_size(dataset, settings)
    record: dict[str, Any] = {  # for args.json
        "data": dataset.fingerprint(),
        "images": len(dataset),
        "data_check": run_startup_checks(dataset, None, settings),
    }

    model, criterion, _ = build_model(settings)
    if checkpoint:
        load_strict(model, checkpoint)
        model.load_frozen(checkpoint.frozen or {}, checkpoint.source)
    model.to(device).to(memory_format=torch.channels_last)
    criterion.to(device)
    record["model"] = log_model_summary(model, settings)
    check_disk_space(folder, model)
    settings = plan_memory(settings, model, criterion, dataset, device, session.auto_batch_size)
    loader = build_loader(dataset, settings, train=True)

    extras = {"args": settings.as_dict(), "data_fingerprint": record["data"]}
    run = trainer.build_run(
        settings, model, criterion, loader, device, folder=folder, checkpoint_extras=extras
    )
    if settings.eval_every:
        run.evaluate = class_agnostic_evaluation(settings, device)
        run.eval_every = settings.eval_every
    if checkpoint:
        trainer.resume_run(run, checkpoint)
    del checkpoint, session  # frees the memory of its tensors: model and optimizer have them now

    if settings.dry_run:
        trainer.dry_run(run)
        return
    save_settings(folder, settings, record)
    train(run, dataset, settings)


if __name__ == "__main__":
    run_script(main, parse)
