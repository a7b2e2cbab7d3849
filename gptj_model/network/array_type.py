"""Annotation of tensors in the Keras model."""

from __future__ import annotations

from typing import Any, TypeAlias

#: A tensor of Keras' backend, or what it is made from: an array, a number, None where it is absent.
#: Keras has no type that is true on every backend; shapes are in the suffixes of the names.
Tensor: TypeAlias = Any
