"""Two processes on CPUs (gloo) equal one with twice the batch size, and both launchers work."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import two_processes
from tests.tiny import (
    FROZEN,
    PRETEXT_FLAGS,
    ROOT,
    RUN_FLAGS,
    assert_same,
    read_checkpoint,
    read_log,
    write_coco,
    write_images,
)
from util import distributed
from util.distributed import (
    all_gather_object,
    all_reduce_sum,
    get_rank,
    get_world_size,
    init_distributed,
    is_main_process,
)
from util.errors import UserError


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    return two_processes.launch(tmp_path_factory.mktemp("two"))


def of_both(results: dict[str, list], name: str) -> list[dict]:
    """Return the results of rank 0 and rank 1."""
    for rank, result in enumerate(results[name]):
        assert isinstance(result, dict), f"rank {rank}: {result}"  # a traceback
    return results[name]


def assert_close_weights(
    a: dict[str, Tensor], b: dict[str, Tensor], rtol: float, atol: float
) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "name",
    [
        "softmax_with_equal_counts",
        "focal_with_any_counts",
        "accumulated_batches",
        "masks",
        "masks_on_a_frozen_detector",
        "one_decoder_layer",
        "encoder_proposals",
        "pretext",
        "siamese",
        "region_prior",
        "teacher",
    ],
)
def test_two_processes_equal_one_with_twice_the_batch_size(
    name: str, results: dict[str, list], tmp_path: Path
) -> None:
    first, second = of_both(results, name)
    single = two_processes.SCENARIOS[name](tmp_path)
    assert_same(first["weights"], second["weights"])
    assert_close_weights(first["weights"], single["weights"], rtol=1e-7, atol=1e-9)
    for key in single["log"]:
        if "cardinality" not in key:
            assert first["log"][key] == second["log"][key], key
            assert first["log"][key] == pytest.approx(single["log"][key], rel=1e-5), key


def test_synced_batch_norm_equals_batch_norm_over_all_rows(
    results: dict[str, list], tmp_path: Path
) -> None:
    """Also with unequal numbers of rows: outputs, gradients and running statistics."""
    first, second = of_both(results, "uneven_batch_norm")
    single = two_processes.uneven_batch_norm(tmp_path)
    torch.testing.assert_close(torch.cat([first["rows"], second["rows"]]), single["rows"])
    torch.testing.assert_close(first["weight"] + second["weight"], single["weight"])
    for result in (first, second):
        assert_close_weights(result["state"], single["state"], rtol=1e-9, atol=1e-9)


def test_ranks_evaluate_with_the_statistics_of_rank_0(results: dict[str, list]) -> None:
    first, second = of_both(results, "statistics_in_an_evaluation")
    assert not torch.equal(first["before"], second["before"])
    assert torch.equal(first["after"], first["before"])
    assert torch.equal(second["after"], first["before"])


def test_training_changed_the_weights(results: dict[str, list]) -> None:
    """Without this, the equality above would mean little."""
    two, three = (
        of_both(results, name)[0]["weights"] for name in ("softmax_with_equal_counts", "pretext")
    )
    moved = [
        name
        for name in two
        if name in three and "class_embed" not in name and not torch.equal(two[name], three[name])
    ]
    assert any("layer4" in name for name in moved)
    assert any("decoder" in name for name in moved)


@pytest.mark.parametrize("name", ["softmax_with_equal_counts", "pretext"])
def test_ranks_see_disjoint_samples(name: str, results: dict[str, list], tmp_path: Path) -> None:
    """In each step they split the images of one process with twice the batch size."""
    first, second = (result["seen"] for result in of_both(results, name))
    single = two_processes.SCENARIOS[name](tmp_path)["seen"]
    assert len(first) == len(second) == len(single) == 3
    for a, b, together in zip(first, second, single, strict=True):
        assert not set(a) & set(b)
        assert sorted(a + b) == sorted(together)
    assert sorted(sum(first + second, [])) == [100 + i for i in range(two_processes.IMAGES)]


def test_a_rank_without_targets_does_not_stop_the_other(
    results: dict[str, list], tmp_path: Path
) -> None:
    first, second = of_both(results, "one_process_without_targets")
    single = two_processes.one_process_without_targets(tmp_path)
    for case, expected in single.items():
        assert_same(first[case]["weights"], second[case]["weights"])
        assert all(math.isfinite(value) for value in first[case]["values"].values())
        if case == "conditional_detr 3":  # focal losses are normalized over all ranks
            assert first[case]["values"]["loss"] == pytest.approx(
                expected["values"]["loss"], rel=1e-4
            )


def test_both_ranks_skip_a_step_that_is_not_finite(results: dict[str, list]) -> None:
    for result in of_both(results, "not_finite_on_one_process"):
        assert result["same"]
        assert result["in_a_row"] == 1
        assert result["message"].endswith("not finite on images [102, 103]")  # of rank 1
        assert result["files"] == ["step_000000_rank_1.pth"]


def test_evaluation_uses_every_image_once(results: dict[str, list], tmp_path: Path) -> None:
    first, second = of_both(results, "evaluation")
    single = two_processes.evaluation(tmp_path)
    assert 0.3 < single["stats"][0] < 0.95
    for result in (first, second):
        for name in ("stats", "voc", "class_error"):
            assert result[name] == single[name]
        assert sorted(result["results"], key=str) == sorted(single["results"], key=str)
    assert {row["image_id"] for row in single["results"]} == {100 + i for i in range(7)}
    assert not set(first["examples"]) & set(second["examples"])


def test_only_rank_0_lists_images(results: dict[str, list]) -> None:
    """The other ranks get its list, or its error."""
    first, second = of_both(results, "one_looks_for_images")
    assert (len(first["looked"]), second["looked"]) == (1, [])
    assert len(first["paths"]) == 3
    assert first["paths"] == second["paths"]
    assert first["refused"] == second["refused"]
    assert "nowhere does not exist" in first["refused"]


def test_two_processes_stop_together_and_resume_bit_exactly(results: dict[str, list]) -> None:
    first, second = of_both(results, "stop_and_resume")
    for result in (first, second):
        assert "epoch 1, after batch 2 of 3" in result["message"]
        assert result["steps"] == 2
        assert result["states"] == 2
        assert result["states_differ"]  # dropout differs between ranks
        assert_same(result["resumed"], result["whole"])
    assert_same(first["whole"], second["whole"])


def run_launcher(module: list[str], script: str, flags: list[object]) -> str:
    """Run a script in two processes and return its output."""
    launcher = [sys.executable, "-m", *module, "--nproc_per_node", 2]
    command = [*launcher, "--master_port", two_processes.free_port(), script, *flags]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_torchrun(tmp_path: Path) -> None:
    """The whole script with two processes: live batch norm, padding, an odd number of validation images."""
    coco, run = write_coco(tmp_path / "coco", train=4), tmp_path / "run"
    training = ["--lr_backbone", "0", "--epochs", 1, "--batch_size", 1]
    flags = [*RUN_FLAGS, *training, "--coco_path", coco, "--output_dir", run]
    text = run_launcher(["torch.distributed.run"], "finetune_main.py", flags)
    assert text.count("distributed: 2 processes, gloo") == 1  # only rank 0 logs
    assert text.count("4 training and 3 validation images") == 1
    assert "epoch 1/1: 2/2 [" in text
    assert len(read_log(run)) == 1
    checkpoint = read_checkpoint(run / "checkpoint.pth")
    assert checkpoint["world_size"] == len(checkpoint["random_states"]) == 2
    assert not any(key.startswith("module.") for key in checkpoint["model"])
    results = json.loads((run / "results.json").read_text())
    assert {row["image_id"] for row in results} == {501, 502, 503}


@pytest.mark.slow  # starts the same code as torchrun
def test_torch_distributed_launch(tmp_path: Path) -> None:
    """The launcher of the published commands."""
    images, run = write_images(tmp_path / "images", count=4), tmp_path / "run"
    training = [*FROZEN, "--epochs", 1, "--feature_recon"]
    flags = [*RUN_FLAGS, *PRETEXT_FLAGS, *training, "--imagenet_path", images, "--output_dir", run]
    text = run_launcher(["torch.distributed.launch", "--use_env"], "main.py", flags)
    assert "epoch 1/1: 1/1 [" in text
    assert read_checkpoint(run / "checkpoint.pth")["world_size"] == 2


def test_a_single_process_needs_no_process_group() -> None:
    assert (get_rank(), get_world_size(), is_main_process()) == (0, 1, True)
    assert all_gather_object({"a": 1}) == [{"a": 1}]
    assert all_reduce_sum(torch.tensor([2.0])).item() == 2.0


def test_a_process_started_alone_joins_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within SLURM, unless srun starts several tasks. Those need an address."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert init_distributed("cpu") == torch.device("cpu")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv(
        "SLURM_NTASKS", "4"
    )  # set in a batch job's shell, too, which is no srun task
    assert init_distributed("cpu") == torch.device("cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert init_distributed("cpu") == torch.device("cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        init_distributed("cpu")


def test_a_slurm_task_that_sees_one_gpu_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its number on the node."""
    for num_visible, local_rank in ((1, "0"), (4, "3")):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_PROCID", "3")
        monkeypatch.setenv("SLURM_LOCALID", "3")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=num_visible: count)
        distributed._slurm_environment()
        found = [os.environ[name] for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE")]
        assert found == [local_rank, "3", "4"]


def test_a_gpu_given_by_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read with streams and events, which belong to the current GPU."""
    chosen = []
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda:1", "cuda", "cpu", "cpu:0"):
        assert init_distributed(device) == torch.device(device)
    assert chosen == ["cuda:1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported() -> None:
    with pytest.raises(UserError, match="--device cpu"):
        init_distributed("cuda")
