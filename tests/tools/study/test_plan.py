"""The plan of a transfer study: rows differ in the pretext task only, and the scripts accept all commands."""

from argparse import Namespace
from pathlib import Path

import pytest

from tests.documents import config_words, import_tool, parse
from tests.study_cases import prepare_data, run_words
from tests.tiny import ROOT
from tools import transfer_study
from tools.study import presets
from tools.study.plan import Step, build_plan, changes_something
from tools.study.prepare import read_manifest
from tools.study.runner import build_command
from util.errors import UserError
from util.settings.words import to_words


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("study"))


def steps_of(data: Path, **flags: object) -> list[Step]:
    args = transfer_study.parse(["run", *run_words(data, Path("out"), **flags)])
    return build_plan(args, read_manifest(data)).steps()


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("detector", presets.DETECTOR_FLAGS)
def test_fine_tunings_differ_only_in_their_checkpoint(
    data: Path, preset: str, detector: str
) -> None:
    steps = steps_of(
        data, preset=preset, detectors=detector, ablations="region_prior-random", fractions=1
    )
    tuned = [
        dict(step.flags)
        for step in steps
        if step.kind == "finetune" and step.fraction == 1 and step.seed == 2
    ]
    assert len(tuned) == 5
    assert "pretrain" not in tuned[0]
    assert len({flags.pop("pretrain", "") for flags in tuned}) == 5
    assert len({flags.pop("output_dir") for flags in tuned}) == 5
    assert all(flags == tuned[0] for flags in tuned)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_the_scripts_accept_all_commands(data: Path, preset: str) -> None:
    """Every row of every preset; configs are run by bash and exist."""
    of_configs = {pretext for _, pretext in presets.PRESETS[preset].configs}
    ablations = [
        name
        for name, row in presets.ABLATIONS.items()
        if changes_something(row, presets.PRESETS[preset])
        and (
            row.pretext not in of_configs
            or (row.step_factor == 1 and None not in row.changes.values())
        )
    ]
    detectors = list(presets.DETECTOR_FLAGS)
    steps = steps_of(
        data, preset=preset, detectors=detectors, ablations=ablations, seeds=1, fractions=1
    )
    for step in steps:
        flags = [
            word.replace("{data}", str(data)).replace("{study}", "out")
            for word in to_words(step.flags)
        ]
        words = [step.script, *flags]
        if words[0].endswith(".sh"):
            words = config_words(ROOT / words[0], *words[1:])
        if words[0].startswith("tools/"):
            import_tool(words[0]).parse(words[1:])
        else:
            settings = parse(words)
            published = 800 if words[0] == "finetune_main.py" else 480
            assert settings.image_size == (published if preset == "paper" else 64)
            assert settings.seed == 1


def test_the_edge_model_goes_to_all_steps_with_edge_boxes(data: Path, tmp_path: Path) -> None:
    """A proposal cache records its edge model, and pre-training on the cache has to name the same."""
    steps = steps_of(
        data,
        pretexts="none",
        ablations=("region_prior-edge_boxes", "region_prior-random"),
        seeds=1,
        fractions=1,
        edge_model=tmp_path / "model.yml.gz",
    )
    named = {
        step.name
        for step in steps
        if step.flags.get("edge_model") == str(tmp_path / "model.yml.gz")
    }
    assert named == {
        "proposals/edge_boxes",
        "pretrain/conditional_detr/region_prior-edge_boxes_seed1",
    }


def test_commands_for_several_gpus() -> None:
    """Configs start their script with $LAUNCH, tools run in one process, and processes share the cores."""
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "8"]
    args = Namespace(
        data=Path("d"), output_dir=Path("o"), cores=32, jobs=2, num_workers=None, device=None
    )

    def of(preset: str, kind: str, script: str) -> tuple[list[str], dict[str, str]]:
        args.preset = preset
        step = Step(name="x", kind=kind, script=script, flags={"seed": 1})
        return build_command(step, args, "python", Path())

    flags = ["--seed", "1", "--num_workers"]
    assert of("paper", "finetune", "finetune_main.py") == (
        [*torchrun, "finetune_main.py", *flags, "1"],
        {"OMP_NUM_THREADS": "2"},
    )
    config = ["bash", "configs/a.sh", *flags]
    several = {"OMP_NUM_THREADS": "2", "LAUNCH": " ".join(torchrun)}
    assert of("paper", "pretrain", "configs/a.sh") == ([*config, "1"], several)
    alone = {"OMP_NUM_THREADS": "16"}
    assert of("cpu", "pretrain", "configs/a.sh") == ([*config, "8"], {**alone, "LAUNCH": "python"})
    assert of("paper", "recall", "tools/a.py") == of("cpu", "recall", "tools/a.py")
    assert of("cpu", "recall", "tools/a.py") == (["python", "tools/a.py", *flags, "8"], alone)
    assert of("cpu", "proposals", "tools/a.py") == (["python", "tools/a.py", *flags, "16"], alone)


def test_the_plan_is_ordered_by_seed(data: Path) -> None:
    """A study that stops early has all rows of its first seeds. All fine-tunings share one pre-training."""
    steps = steps_of(data, seeds=(5, 6), pretrain_seeds=1, fractions=(1, 0.5))
    tuned = [step for step in steps if step.kind == "finetune"]
    assert [step.seed for step in tuned] == [5] * 8 + [6] * 8
    assert [step.fraction for step in tuned[:8]] == [1.0] * 4 + [0.5] * 4
    assert sum(step.kind == "pretrain" for step in steps) == 3, "one per pretext task"
    varied = steps_of(data, seeds=(5, 6), pretrain_seeds=(1, 2), fractions=(1, 0.5))
    starts = {
        step.seed: step.needs
        for step in varied
        if step.kind == "finetune" and step.variant == "siamese"
    }
    assert starts == {
        seed: (f"pretrain/conditional_detr/siamese_seed{seed - 4}",) for seed in (5, 6)
    }


def test_a_checkpoint_can_be_a_row(data: Path, tmp_path: Path) -> None:
    """It is fine-tuned like all others; nothing is pre-trained for it."""
    file = tmp_path / "mine.pth"
    file.touch()
    steps = steps_of(data, pretexts="none", seeds=1, fractions=1, pretrained=f"mine={file}")
    assert [step.name for step in steps] == [
        f"finetune/conditional_detr/{row}/1_seed1" for row in ("none", "mine")
    ]
    none, mine = (dict(step.flags) for step in steps)
    assert mine == {
        **none,
        "pretrain": str(file),
        "output_dir": "{study}/finetune/conditional_detr/mine/1_seed1",
    }
    for words, what in (
        ("mine", "give NAME=FILE"),
        (f"a/b={file}", "give NAME=FILE"),
        (f"siamese={file}", "is another row's name"),
        (f"mine={file}x", "does not exist"),
    ):
        with pytest.raises(UserError, match=what):
            steps_of(data, fractions=1, pretrained=words)


@pytest.mark.parametrize("change", ["no_reconstruction", "longer"])
def test_ablations_can_not_remove_flags_of_a_config(data: Path, change: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"{change}: configs/UPDETR_conditional_pretrain_in\.sh fixes what it changes",
    ):
        steps_of(data, preset="paper", fractions=1, ablations=f"random_query_patch-{change}")


@pytest.mark.parametrize(
    ("preset", "row"),
    [("cpu", "region_prior-edge_boxes"), ("cpu-smoke", "siamese-selective_search")],
)
def test_a_row_that_changes_nothing_is_refused(data: Path, preset: str, row: str) -> None:
    with pytest.raises(UserError, match=f"{row}: that is what --preset {preset} does"):
        steps_of(data, preset=preset, fractions=1, ablations=row)


def test_a_longer_row_differs_only_in_pre_training_steps(data: Path) -> None:
    """The learning rate drops at the same fraction of them; fine-tuning is the same."""
    rows = "region_prior", "region_prior-longer"
    steps = steps_of(data, preset="cpu", pretexts=rows[0], ablations=rows[1], seeds=1, fractions=1)
    pretrained, tuned = (
        [dict(step.flags) for step in steps if step.kind == kind and step.variant in rows]
        for kind in ("pretrain", "finetune")
    )
    lengths = [
        (int(flags.pop("max_iters")), int(flags.pop("lr_drop_iters"))) for flags in pretrained
    ]
    assert lengths[1] == tuple(4 * steps for steps in lengths[0])
    for pair in (pretrained, tuned):
        removed = (
            [flags.pop("output_dir") for flags in pair],
            [flags.pop("pretrain", "") for flags in pair],
        )
        assert pair[0] == pair[1], removed


def test_a_fraction_that_was_not_prepared_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match=r"--fractions 0\.25: .* has 0\.5 1"):
        steps_of(data, fractions=0.25)


def test_evaluate_on_val_uses_the_validation_images(data: Path) -> None:
    steps = steps_of(data, fractions=1, seeds=1, evaluate_on="val", lr=3e-4)
    tuned = [step.flags for step in steps if step.kind == "finetune"]
    assert {flags["val_annotations"] for flags in tuned} == {"{data}/annotations/val.json"}
    assert {(flags["lr"], flags["lr_backbone"]) for flags in tuned} == {(3e-4, 3e-4 * 0.1)}
