"""Check that a source is still what a manifest says was converted; nothing is judged by another
one."""

from __future__ import annotations

from collections.abc import Sequence

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.manifest import MANIFEST_FILE, Manifest, describe_source
from gptj_model.errors import FileFault


def is_stated(source: Checkpoint, manifest: Manifest | None) -> bool:
    """Return whether the manifest describes a conversion of what is at the source's path."""
    if not manifest:
        return False
    now = describe_source(source)
    merged, stated = now.get("adapter"), manifest.source.get("adapter")
    if (merged and merged["path"]) != (stated and stated.get("path")):
        return False
    return all(manifest.source.get(key) == now[key] for key in ("path", "format"))


def refuse_changed_source(
    source: Checkpoint, manifest: Manifest | None, changed: Sequence[str] = ()
) -> None:
    """Refuse to judge by a source that is no longer what was converted.

    Args:
        source, manifest: source and manifest of `is_stated`.
        changed: HF names of tensors that differ from what the manifest records.

    Raises:
        FileFault: the source has changed.
    """
    if not manifest or not is_stated(source, manifest):
        return
    what = f"tensor {changed[0]}" if changed else "the size of its files"
    now = describe_source(source)
    if manifest.source.get("adapter") != now.get("adapter"):
        what = "the adapter that was merged into it"
    if changed or any(manifest.source.get(key) != now.get(key) for key in ("files", "adapter")):
        more = f" and {len(changed) - 1} more tensors" if len(changed) > 1 else ""
        raise FileFault(
            f"{source.path}: has changed since it was converted, according to "
            f"{MANIFEST_FILE}: {what}{more}",
            hint="convert it again, or name the original with `--against SRC`",
        )
