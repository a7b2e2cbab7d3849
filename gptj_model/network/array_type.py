"""How tensors are annotated."""

from __future__ import annotations

from typing import Any, TypeAlias

#: A tensor of Keras' backend, or what it makes one of: an array, a number, None for none. Keras
#: has no type that is true on every backend; shapes are in the names' suffixes.
Tensor: TypeAlias = Any
