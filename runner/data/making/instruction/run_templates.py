"""templates.json: templates of the records that a run trained on, kept in its folder.

`gptj generate --chat` then renders prompts as the records were rendered, also where these are gone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gptj_convert.files.whole_file import write_whole
from gptj_convert.formats.layouts.tf import RUN_PREFIX, TEMPLATES_FILE
from gptj_convert.settings.params_yaml import PARAMS_FILE
from gptj_model.errors import FileFault, GptjError
from runner.config.params_file import load_params
from runner.data.making.instruction.stated_templates import (
    StatedTemplates,
    joined,
    stated_templates,
)


def keep_templates(model_dir: Path, folders: Sequence[str]) -> None:
    """Write templates.json if the records in the folders state their templates, and agree.

    Training needs no template: damage is reported when one is asked for.
    """
    try:
        found = _of_folders(folders)
    except GptjError:
        return
    if found:
        text = json.dumps(found.to_json(), indent=1) + "\n"
        path = model_dir / TEMPLATES_FILE
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)


def templates_of_run(model_dir: Path) -> StatedTemplates | None:
    """Return the templates of the records that a run trained on.

    Returns:
        Those of templates.json, else of the records that params.yaml names, else None.

    Raises:
        FileFault: templates.json or a data_params.json is damaged.
        ConfigError: params.yaml cannot be read.
        UsageError: the records were made with several templates.
    """
    kept = model_dir / TEMPLATES_FILE
    if kept.is_file():
        try:
            values = json.loads(kept.read_bytes())
        except (ValueError, RecursionError):
            raise FileFault(
                f"{kept}: is not JSON, expected the templates of the run's records",
                hint="name the template with --template",
            ) from None
        return StatedTemplates.from_json(values, kept)
    path = model_dir / PARAMS_FILE
    # A converted checkpoint has a params.yaml too, and has not been trained on what it names.
    if path.is_file() and any(model_dir.glob(f"{RUN_PREFIX}-*.index")):
        return _of_folders(load_params(path).train_input.data_dir)
    return None


def _of_folders(folders: Sequence[str]) -> StatedTemplates | None:
    found = [stated for folder in folders if (stated := stated_templates(Path(folder)))]
    return joined(found, ", ".join(folders)) if found else None
