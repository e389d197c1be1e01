"""Triton's interpreter without most of its own work: the same operations on the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.runtime import interpreter

tl = interpreter.tl


def hasten() -> None:
    """Have it do nothing that nobody looks at, and what is always the same once; for this process."""
    if getattr(interpreter, "hastened", False):
        return
    interpreter.hastened = True
    # Every sum of integers is made again in 64 bits, for an assert that without ``debug`` is none.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    # Not every version of triton tells when a launch ends.
    if hasattr(interpreter, "_LangPatchScope"):
        _patch_once_a_launch()
    _know_types()


def _patch_once_a_launch() -> None:
    """The language is patched for every kernel, and not for every function that it calls."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[int] = set()

    def once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def ended(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = once, ended


def _know_types() -> None:
    """What the name of a type says: numpy's type, and the shape and size of a tensor."""
    numpys: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    blocks: dict[Any, Any] = {}
    find, make, make_block = interpreter._get_np_dtype, tl.tensor.__init__, tl.block_type.__init__

    def found(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in numpys:
            numpys[name] = find(dtype)
        return numpys[name]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in sizes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = sizes[type.name]
        else:
            make(self, handle, type)
            sizes[type.name] = self.shape, self.numel

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key in blocks:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = blocks[key]
        else:
            make_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name

    interpreter._get_np_dtype, tl.tensor.__init__, tl.block_type.__init__ = found, tensor, block_type
