"""The content of JSON files of annotations, read without their segmentations."""

import json
import re
from typing import Any

from datasets.labelled.segmentations import SegmentationTexts
from util.errors import UserError
from util.gc_paused import gc_paused

# Matches a "segmentation" whose value is a list. The match ends at the last bracket before the next key or the end of
# the object. It cannot start inside a string: quotes in a JSON string are escaped.
POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[^"{}]*\]')


def read_json(path: str, segmentations: SegmentationTexts | None = None) -> Any:
    """Return the content of a JSON file in UTF-8 or UTF-16, with or without a byte order mark.

    Segmentations are two thirds of COCO's file and would become millions of Python objects, so they are replaced before
    parsing.

    Args:
        segmentations: collects their texts, which are replaced by their numbers. None: polygons become empty lists.

    Raises:
        UserError: the file does not exist or is not JSON.
    """
    try:
        with open(path, "rb") as file, gc_paused():
            try:
                if segmentations is not None:
                    return json.loads(segmentations.replace_in(file.read()))
                return json.loads(POLYGONS.sub(b'"segmentation":[]', file.read()))
            except ValueError:
                # Parse the unchanged file again, so that the error gives positions in the file itself.
                if segmentations is not None:
                    segmentations.clear()
                file.seek(0)
                return json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: put the COCO annotations there") from error
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    # Deeply nested brackets exceed Python's recursion limit.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): is the download complete?") from error
