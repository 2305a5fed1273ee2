"""Scenarios of distributed training, run in two processes and again in a single one to compare.

Each scenario takes a folder for files and returns plain values and tensors. `launch` starts the processes and returns
{scenario: [result of rank 0, result of rank 1]}.
"""

import math
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import engine
import trainer
from datasets import build_loader, transfer
from datasets.evaluators.coco import CocoEvaluator, build_ground_truth
from datasets.evaluators.voc import VocEvaluator
from datasets.images.image_folder import ImageFolder
from datasets.labelled.coco_parser import parse_coco
from datasets.sample import SampleDataset
from models import build_model
from models.classification import Classification
from models.criterion import SetCriterion
from models.postprocess import PostProcess
from models.synced_batch_norm import SyncedBatchNorm
from models.trainable import TrainableModel
from tests.tiny import FROZEN, make_batch, make_targets, tiny_args, write_images
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.distributed import (
    broadcast_batch_norm_stats,
    compute_on_rank0,
    get_rank,
    get_world_size,
    init_distributed,
    shutdown,
    unwrap_model,
)
from util.errors import StopRequested, UserError
from util.nested_tensor import NestedTensor
from util.packed_targets import PackedTargets
from util.random_state import SampleRNG
from util.runs.nonfinite import Batch
from util.runs.session import seed_everything
from util.settings import FINETUNE, PRETRAIN, Settings

WORLD_SIZE = 2
NORMALIZATION = {"mean": [0.5] * 3, "std": [0.25] * 3}
IMAGES, SIDE = 12, 64  # number of images, and their side in pixels


def to_uint8(normalized: Tensor) -> Tensor:
    """Turn random normal values into pixels around 128."""
    return (normalized * 40 + 128).clamp(0, 255).to(torch.uint8)


class Scenes(SampleDataset):
    """Random images of one size. Image i has `counts[i]` objects, or for a pretext `patches` of them."""

    def __init__(self, counts: list[int], patches: int = 0) -> None:
        super().__init__(seed=0)
        self.targets = make_targets(counts, patches=patches)
        images = make_batch([(SIDE, SIDE)] * len(counts)).tensors
        self.images = to_uint8(images)  # [IMAGES, 3, SIDE, SIDE]

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, dict]:
        target = dict(self.targets[index])
        if "patches" in target:
            target["patches"] = to_uint8(target["patches"])
        size = torch.tensor([SIDE, SIDE])
        return self.images[index], {**target, "size": size, "orig_size": size}


class MaskScenes(Scenes):
    """Scenes with a random mask for each object."""

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, dict]:
        image, target = super().load(index, rng)
        generator = torch.Generator().manual_seed(index)
        noise = torch.rand(len(target["labels"]), SIDE, SIDE, generator=generator)
        return image, {**target, "masks": (noise > 0.5).byte()}


class Pairs(Scenes):
    """Two views of each image, the second one flipped, with the same regions in reverse order."""

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, dict]:
        image, target = super().load(index, rng)
        boxes = torch.stack([target["boxes"], target["boxes"].flip(0)])  # [2, N, 4]
        views = {name: torch.stack([value, value]) for name, value in target.items()}
        return torch.stack([image, image.flip(1)]), {**views, "boxes": boxes}


def in_float64(original: Callable) -> Callable:
    """Convert batches to float64, so that one process and two differ by no more than rounding."""

    def to_device(*args, **normalization) -> tuple[NestedTensor, PackedTargets]:
        samples, targets = original(*args, **normalization)
        tensors = {
            name: value.double() if value.is_floating_point() else value
            for name, value in targets.tensors.items()
        }
        images = NestedTensor(samples.tensors.double(), samples.mask, samples.padded)
        return images, replace(targets, tensors=tensors)

    return to_device


def build_run(
    args: Settings,
    dataset: SampleDataset | None = None,
    folder: Path | None = None,
    double: bool = True,
) -> trainer.Run:
    """Build the run of this process; `args.batch_size` is the global batch size."""
    torch.manual_seed(get_rank())  # other weights per rank: DDP has to broadcast those of rank 0
    args = args.replace(batch_size=args.batch_size // get_world_size())
    model, criterion, _ = build_model(args)
    if double:
        model, criterion = model.double(), criterion.double()
    loader = build_loader(dataset, args, train=True) if dataset else None
    seed_everything(args.seed)
    return trainer.build_run(
        args,
        model.train(),
        criterion.train(),
        loader,
        torch.device("cpu"),
        folder=folder,
        normalization=NORMALIZATION,
    )


def weights_of(run: trainer.Run) -> dict[str, Tensor]:
    model = unwrap_model(run.model)
    parts = {"": model, **model.frozen_parts()}
    return {
        name + key: value.clone()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }


# ---------------------------------------------------------------------------------------------------- scenarios


def train(
    *flags: str, counts: list[int], script: str = FINETUNE, dataset: type[Scenes] = Scenes
) -> dict:
    """Train three steps of four images; return the image ids of this process, the log and the weights."""
    exact = ("--backbone_norm", "frozen", "--dropout", "0")
    args = tiny_args(script, *exact, "--batch_size", "4", "--lr", "1e-3", *flags)
    run = build_run(args, dataset(counts, patches=5 if script == PRETRAIN else 0))
    original, seen = transfer.to_device, []

    def recorded(samples, targets, device, **normalization):
        seen.append(targets.tensors["image_id"].tolist())
        return in_float64(original)(samples, targets, device, **normalization)

    transfer.to_device = recorded
    try:
        engine.train_one_epoch(run)
    finally:
        transfer.to_device = original
    return {"weights": weights_of(run), "seen": seen, "log": run.averages.means()}


def softmax_with_equal_counts(folder: Path) -> dict:
    return train("--detector", "detr", counts=[2] * IMAGES)


def focal_with_any_counts(folder: Path) -> dict:
    """No step has fewer objects than processes: the published code then divides by 1, not by the mean per process."""
    return train("--detector", "conditional_detr", counts=[3, 0, 1, 4, 0, 2, 1, 2, 5, 0, 0, 2])


def accumulated_batches(folder: Path) -> dict:
    """Two steps of eight images: `--accumulate 2` in two processes, one batch in a single one.

    The four batches of a step, two per process, have 0 to 9 objects.
    """
    flags = ("--accumulate", "2") if get_world_size() > 1 else ("--batch_size", "8")
    counts = [3, 0, 1, 4, 0, 2, 1, 2, 5, 0, 0, 2, 0, 0, 4, 6]
    return train("--detector", "conditional_detr", *flags, counts=counts)


def masks(folder: Path) -> dict:
    """Some processes have no object in a step, and so no mask."""
    counts = [3, 0, 1, 4, 0, 2, 1, 2, 5, 0, 0, 2]
    return train("--masks", "--detector", "conditional_detr", counts=counts, dataset=MaskScenes)


def masks_on_a_frozen_detector(folder: Path) -> dict:
    flags = ("--masks", "--frozen_weights", "FILE", "--detector", "deformable_detr")
    return train(*flags, counts=[2] * IMAGES, dataset=MaskScenes)


def one_decoder_layer(folder: Path) -> dict:
    """With one layer `query_scale` has no gradient. DDP must not wait for it."""
    return train(
        "--detector", "conditional_detr", "--dec_layers", "1", counts=[1, 2, 0] * (IMAGES // 3)
    )


def encoder_proposals(folder: Path) -> dict:
    flags = ("--detector", "deformable_detr", "--two_stage", "--with_box_refine")
    return train(*flags, counts=[1, 0, 2, 3, 0, 0] * (IMAGES // 6))


def pretext(folder: Path) -> dict:
    return train("--feature_recon", "--mask_ratio", "0", counts=[5] * IMAGES, script=PRETRAIN)


# Random proposals and disturbances would differ between one process and two.
SIAMESE_FLAGS = ("--pretext", "siamese", "--proposals", "random", "--box_disturbance", "0")


def siamese(folder: Path) -> dict:
    """Projector and predictor use the batch statistics of both processes."""
    flags = (*SIAMESE_FLAGS, "--detector", "conditional_detr")
    return train(*flags, counts=[5] * IMAGES, script=PRETRAIN, dataset=Pairs)


def region_prior(folder: Path) -> dict:
    """The frozen target encoder, random here, is the same on both ranks."""
    flags = ("--pretext", "region_prior", "--object_embedding_loss", "--num_patches", "10")
    return train(*flags, "--lr_backbone", "1e-3", counts=[5] * IMAGES, script=PRETRAIN)


def teacher(folder: Path) -> dict:
    """Siamese with a momentum teacher, whose backbone trains."""
    flags = (*SIAMESE_FLAGS, "--lr_backbone", "1e-3", "--teacher_momentum", "0.5")
    return train(*flags, counts=[5] * IMAGES, script=PRETRAIN, dataset=Pairs)


def uneven_batch_norm(folder: Path) -> dict:
    """Eight rows, three on rank 0 and five on rank 1; the loss is a sum over all."""
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(2, 8, 4, dtype=torch.float64, generator=generator)  # [8, 4] each
    if get_world_size() == 1:
        mine = slice(None)
    else:
        mine = slice(3) if get_rank() == 0 else slice(3, None)

    norm = SyncedBatchNorm(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 5))
        norm.bias.copy_(torch.arange(4))
    x = rows[mine].clone().requires_grad_()
    outputs = norm(x)
    (outputs * weights[mine]).sum().backward()
    return {
        "rows": torch.cat([outputs.detach(), x.grad], 1),
        "weight": norm.weight.grad,
        "state": norm.state_dict(),
    }


def statistics_in_an_evaluation(folder: Path) -> dict:
    """Batch norm that has seen other images on each rank. Both ranks evaluate with the statistics of rank 0."""
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(8, 3, generator=torch.Generator().manual_seed(get_rank())))
    before = norm.running_mean.clone()
    broadcast_batch_norm_stats(nn.Sequential(norm))
    return {"before": before, "after": norm.running_mean}


def own_slice(global_batch: int) -> slice:
    """Return the part of a global batch that this process trains on."""
    size = global_batch // get_world_size()
    return slice(get_rank() * size, (get_rank() + 1) * size)


def step(detector: str, counts: list[int], images: NestedTensor) -> tuple[trainer.Run, dict]:
    """Train one step on four images, two per process."""
    exact = ("--backbone_norm", "frozen", "--dropout", "0")
    args = tiny_args(FINETUNE, *exact, "--detector", detector, "--batch_size", "4")
    run = build_run(args, double=False)
    mine = own_slice(4)
    samples = NestedTensor(images.tensors[mine], images.mask[mine], images.padded)
    values, _ = engine.train_step(run, samples, make_targets(counts)[mine], stop=False)
    return run, values


def one_process_without_targets(folder: Path) -> dict:
    found = {}
    for detector in ("detr", "conditional_detr"):
        for counts in ([2, 1, 0, 0], [0, 0, 0, 0]):
            run, values = step(detector, counts, make_batch(4))
            found[f"{detector} {sum(counts)}"] = {"weights": weights_of(run), "values": values}
    return found


def not_finite_on_one_process(folder: Path) -> dict:
    images = make_batch(4)
    images.tensors[3, 0, 0, 0] = math.nan
    args = tiny_args(FINETUNE, "--backbone_norm", "frozen", "--dropout", "0", "--batch_size", "4")
    run = build_run(args, double=False)
    before, mine = weights_of(run), own_slice(4)
    samples = NestedTensor(images.tensors[mine], images.mask[mine], False)
    targets = make_targets([2, 1, 1, 0])[mine]
    run.guard.add(Batch(samples, PackedTargets.pack(targets)), is_first=True)
    run.guard.folder, run.guard.describe = folder / "nonfinite", lambda: Checkpoint(model={})
    engine.train_step(run, samples, targets, stop=False)
    same = all(torch.equal(value, before[name]) for name, value in weights_of(run).items())
    return {
        "message": run.guard.last_report,
        "in_a_row": run.guard.in_a_row,
        "same": same,
        "files": sorted(path.name for path in run.guard.folder.glob("*")),
    }


class Oracle(TrainableModel):
    """A detector that reads the image number from the first pixel and answers from a table."""

    def __init__(self, boxes: Tensor, labels: Tensor, classes: int) -> None:
        super().__init__()
        self.boxes, self.labels, self.classes = boxes, labels, classes

    def forward(self, samples: NestedTensor) -> dict:
        index = samples.tensors[:, 0, 0, 0].round().long()
        one_hot = nn.functional.one_hot(self.labels[index], self.classes).float()  # [B, Q, C]
        logits = one_hot * 8 - 4 + index[:, None, None] * 0.1  # other scores in each image
        return {"pred_logits": logits, "pred_boxes": self.boxes[index]}


class Numbered(Scenes):
    """Scenes whose first pixel is the image number."""

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, dict]:
        image, target = super().load(index, rng)
        image = image.clone()
        image[:, 0, 0] = index
        return image, target


def evaluation(folder: Path) -> dict:
    """Evaluate seven images, four of them on one rank, with exact, imprecise and missed boxes."""
    dataset = Numbered([2] * 7)
    boxes, labels = (
        torch.stack([target[name] for target in dataset.targets]) for name in ("boxes", "labels")
    )
    truth = {
        "images": [
            {"id": 100 + i, "width": SIDE, "height": SIDE, "file_name": f"{i}.png"}
            for i in range(7)
        ],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 5)],
        "annotations": [
            {
                "id": 2 * i + k + 1,
                "image_id": 100 + i,
                "category_id": int(labels[i, k]),
                "iscrowd": 0,
                "bbox": (torch.cat([box[:2] - box[2:] / 2, box[2:]]) * SIDE).tolist(),
                "area": float(box[2:].prod()) * SIDE**2,
            }
            for i in range(7)
            for k, box in enumerate(boxes[i])
        ],
    }
    moved = boxes.clone()
    moved[::2, 0, 2] *= 0.8
    moved[1, 1, 0] += 0.4
    classification = Classification("focal", 5, cost_class=2.0)
    criterion = SetCriterion(classification, {"loss_ce": 1.0})
    args = tiny_args(FINETUNE, "--batch_size", "2")
    found = {}
    for name, evaluator in (
        ("coco", CocoEvaluator(build_ground_truth(truth))),
        ("voc", VocEvaluator(parse_coco(truth, "made"))),
    ):
        found[name], examples = engine.evaluate(
            Oracle(moved, labels, 5),
            criterion,
            {"bbox": PostProcess(classification)},
            build_loader(dataset, args, train=False),
            evaluator,
            device=torch.device("cpu"),
            normalization={"mean": [0.0] * 3, "std": [1 / 255] * 3},
            amp=None,
            num_examples=2,
        )
    voc = {name: found["voc"][name] for name in ("coco_eval_bbox", "voc_area", "per_class")}
    return {
        "stats": found["coco"]["coco_eval_bbox"],
        "voc": voc,
        "class_error": found["coco"]["class_error"],
        "results": evaluator.results(),
        "examples": [row["image_id"] for row in examples],
    }


def stop_and_resume(folder: Path) -> dict:
    """Ask only the last rank to stop. All ranks stop, resume, and end where a run without a stop ends."""
    flags = (*FROZEN, "--batch_size", "4", "--epochs", "2", "--dropout", "0.3")

    def start(name: str) -> trainer.Run:
        return build_run(
            tiny_args(FINETUNE, *flags), Scenes([2] * IMAGES), folder / name, double=False
        )

    for name in ("whole", "stopped"):
        (folder / name).mkdir(exist_ok=True)
    whole = start("whole")
    trainer.fit(whole)
    stopped, original, calls = start("stopped"), engine.train_step, []

    def stop_in_second_step(run, samples, targets, stop, *place):
        calls.append(1)
        is_last_rank = get_rank() == get_world_size() - 1
        return original(run, samples, targets, len(calls) == 2 and is_last_rank, *place)

    engine.train_step = stop_in_second_step
    try:
        trainer.fit(stopped)
        message = ""
    except StopRequested as stop:
        message = str(stop)
    finally:
        engine.train_step = original
    checkpoint = load_checkpoint(folder / "stopped" / "checkpoint.pth")
    torch.manual_seed(12345)
    resumed = start("stopped")
    unwrap_model(resumed.model).load_state_dict(checkpoint.model)
    trainer.resume_run(resumed, checkpoint)
    trainer.fit(resumed)
    states = checkpoint.random_states
    return {
        "message": message,
        "whole": weights_of(whole),
        "resumed": weights_of(resumed),
        "steps": len(calls),
        "states": len(states),
        "states_differ": not torch.equal(states[0]["torch"], states[-1]["torch"]),
        "numbers": [whole.best_ap, resumed.best_ap],
    }


def one_looks_for_images(folder: Path) -> dict:
    """List an image folder and a missing one: the folders that this rank scanned, the images, the error."""
    root = compute_on_rank0(lambda: write_images(folder / "images", 3))
    original, looked = os.scandir, []

    def scandir(path):
        looked.append(str(path))
        return original(path)

    os.scandir = scandir
    try:
        images = ImageFolder(str(root))
        refused = ""
        ImageFolder(str(folder / "nowhere"))
    except UserError as error:
        refused = str(error)
    finally:
        os.scandir = original
    return {
        "looked": looked,
        "paths": [images.path(i) for i in range(len(images))],
        "refused": refused,
    }


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        softmax_with_equal_counts,
        focal_with_any_counts,
        accumulated_batches,
        masks,
        masks_on_a_frozen_detector,
        one_decoder_layer,
        encoder_proposals,
        pretext,
        siamese,
        region_prior,
        teacher,
        uneven_batch_norm,
        statistics_in_an_evaluation,
        one_process_without_targets,
        not_finite_on_one_process,
        evaluation,
        one_looks_for_images,
        stop_and_resume,
    )
}


# ---------------------------------------------------------------------------------------------------- starting


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    init_distributed("cpu")
    results = {}
    for name, scenario in SCENARIOS.items():
        try:
            (folder / name).mkdir(exist_ok=True)
            results[name] = scenario(folder / name)
        except Exception:  # noqa: BLE001  (the test prints it and fails)
            results[name] = traceback.format_exc()
            break  # the other rank may wait in a collective, which the end of this process interrupts
    torch.save(results, folder / f"results{rank}.pth")
    shutdown()


def launch(folder: Path) -> dict[str, list]:
    """Run all scenarios in two processes."""
    spawn(_process, args=(free_port(), folder), nprocs=WORLD_SIZE)
    results = [
        torch.load(folder / f"results{rank}.pth", weights_only=True) for rank in range(WORLD_SIZE)
    ]
    return {name: [result.get(name, "not reached") for result in results] for name in SCENARIOS}
