"""The state dict of a PyTorch optimizer, `optimizer.pt`, read and written without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptj_convert.formats.containers.layout import FileLayout
from gptj_convert.formats.containers.torch_archive import archive_file
from gptj_convert.formats.containers.torch_checkpoint import TorchCheckpointSource
from gptj_convert.formats.containers.torch_pickle import PickledTensor
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo

OPTIMIZER_FILE = "optimizer.pt"

#: Prefix of the names of state tensors, before the number of the parameter and the key.
_PREFIX = "optimizer.state."

#: State of each parameter by its number, and the groups that list the numbers.
State = Mapping[int, Mapping[str, Any]]
Groups = Sequence[Mapping[str, Any]]


class OptimizerSource(TorchCheckpointSource):
    """Tensors of an optimizer's state, with names of the form `optimizer.state.NUMBER.KEY`.

    Attributes:
        plain: values of the state that are not tensors, by names of the same form.
        groups: param_groups of the optimizer.
        more: other entries of the state dict.

    Raises:
        FileFault: `TorchCheckpointSource` refuses the file, or it is not an optimizer's state dict.
    """

    def _named(self, values: dict[str, Any]) -> Mapping[str, Any]:
        self.plain: dict[str, Any] = {}
        self.more = dict(values)
        state, self.groups = (self.more.pop(key, None) for key in ("state", "param_groups"))
        if not (_is_state(state) and _is_groups(self.groups)):
            raise FileFault(
                f"{self._file.path}: is not an optimizer's state dict, expected `state` keyed "
                "by parameter number, and `param_groups` with those numbers",
                hint="save it with torch.save(optimizer.state_dict(), 'optimizer.pt')",
            )
        named = {f"{_PREFIX}{n}.{k}": v for n, entry in state.items() for k, v in entry.items()}
        self.plain = {k: v for k, v in named.items() if not isinstance(v, PickledTensor)}
        return {k: v for k, v in named.items() if k not in self.plain}


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(n) is int and isinstance(entry, dict) for n, entry in value.items()
    )


def _is_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(type(n) is int for n in group["params"])
        for group in value
    )


def optimizer_file(
    state: State, groups: Groups, more: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> FileLayout:
    """Return the layout of a new optimizer.pt.

    Args:
        state: state of each parameter by its number; a value is the name of a tensor, or the bytes
            of a float32 scalar.
        groups: param_groups, made of plain values.
        more: further entries of the state dict, made of plain values.
        tensors: tensors that the state names.
    """
    value = {"state": dict(state), "param_groups": list(groups), **more}
    return archive_file(OPTIMIZER_FILE, value, tensors)
