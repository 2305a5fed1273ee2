"""`finetune_main.py` by its name in UP-DETR: train, fine-tune or evaluate a DETR detector with labels."""

from finetune_main import main, parse
from util.runs.session import run_script

if __name__ == "__main__":
    run_script(main, parse)
