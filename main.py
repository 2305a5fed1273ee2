"""Pre-trains a detector without labels.

    python main.py --imagenet_path PHOTOGRAPHS --output_dir outputs/pretrain --detector conditional_detr

`python main.py --help` lists every flag; `finetune_main.py --pretrain outputs/pretrain/checkpoint.pth` goes on with
labels.
"""

import os

# Before PyTorch is imported: threads that spin while they wait would starve the loader processes on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from argparse import Namespace

import torch

import trainer
from datasets import build_dataset, build_loader
from datasets.labelled.checks import check_at_start
from datasets.sample import SampleDataset
from datasets.sample_page import draw_found_patches, draw_samples
from models import build_model
from util.checkpoints.checkpoint import load_exactly
from util.distributed import unwrap_model
from util.errors import UserError
from util.logger import log
from util.runs.folder import check_room, describe_settings, prepare_output, save_settings
from util.runs.model_summary import describe_model
from util.runs.page import report
from util.runs.session import prepare_checkpoint, run_script, seed_everything, start_session
from util.settings.arguments import Parser, check_right_script, make_parser, plain_settings
from util.settings.flags import PRETRAIN


def get_args_parser() -> Parser:
    """Every flag of pre-training, without `--help`, so that it can be a parent of another parser."""
    return make_parser(PRETRAIN)


def parse(argv: list[str]) -> Namespace:
    check_right_script(argv)
    return Parser("main.py", parents=[get_args_parser()], description=__doc__.splitlines()[0]).parse_args(argv)


def evaluate(args: Namespace) -> None:
    """Boxes of the pre-trained model against the objects of validation images, whatever their class, as DETReg does on
    COCO.

    With `--eval` in numbers, with `--viz` in pictures of COCO.
    """
    from tools import evaluate_proposals, visualize_pretext

    if not args.resume:
        raise UserError(f"--{'eval' if args.eval else 'viz'} needs the model to evaluate: add --resume PATH")
    if args.eval:
        flags = ["--checkpoint", args.resume, "--output_dir", args.output_dir or ""]
        for name in evaluate_proposals.SHARED_FLAGS:
            if getattr(args, name) is not None:
                value = getattr(args, name)
                flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        evaluate_proposals.main(evaluate_proposals.parse([*flags, "--overwrite"]))
    if args.viz:
        visualize_pretext.draw_objects(args)


def train(run: trainer.Run, dataset: SampleDataset, args: Namespace) -> None:
    """All epochs, with pages of samples and of the run; says at the end what the model is good for."""
    normalization = run.normalization
    draw_samples(run.folder, dataset, args.batch_size, run.epoch, normalization)
    report(run.folder)

    def plot() -> None:
        draw_found_patches(run.folder, unwrap_model(run.model), dataset, normalization, run.device)
        report(run.folder)

    run.on_epoch_end = plot
    trainer.fit(run)
    if run.folder is not None:
        log.info(
            "finished; fine-tune with: python finetune_main.py --detector %s --coco_path COCO --pretrain %s",
            args.detector,
            run.folder / "checkpoint.pth",
        )


def main(args: Namespace) -> None:
    if args.eval or args.viz:
        evaluate(args)
        return
    device = start_session(args)
    checkpoint = prepare_checkpoint(args)
    seed_everything(args.seed)
    folder = prepare_output(args)
    describe_settings(args)

    dataset = build_dataset("train", args)
    loader = build_loader(dataset, args, train=True)
    data_check = check_at_start(dataset, None, args)
    model, criterion, _ = build_model(args)
    if checkpoint:
        load_exactly(model, checkpoint)
        model.load_frozen(checkpoint.get("frozen", {}), checkpoint.source)
    model.to(device, memory_format=torch.channels_last)
    criterion.to(device)
    summary = describe_model(model, args)
    check_room(folder, model)

    backbone = model.detector.backbone[0]
    extras = {
        "args": plain_settings(args),
        "normalization": {"mean": list(backbone.mean), "std": list(backbone.std)},
        "class_names": {},
        "version": trainer.CHECKPOINT_VERSION,
    }
    run = trainer.make_run(args, model, criterion, loader, device, folder=folder, checkpoint_extras=extras)
    if args.eval_every:
        from tools.evaluate_proposals import while_training

        run.evaluate, run.eval_every = while_training(args, device), args.eval_every
    if checkpoint:
        trainer.continue_run(run, checkpoint)
    del checkpoint  # its tensors are in the model and the optimiser now
    if args.dry_run:
        trainer.dry_run(run)
        return
    save_settings(
        folder,
        args,
        {"data": dataset.fingerprint(), "images": len(dataset), "data_check": data_check, "model": summary},
    )
    train(run, dataset, args)


if __name__ == "__main__":
    run_script(main, parse)
