"""Follow which tensors live, real or fake, and how many bytes they would take.

A fake tensor has a shape, a number format and an address book, and no memory (``torch._subclasses.FakeTensorMode``).
Operations on it run the same Python code, and the same autograd, as on a card; only kernels are left out. What a kernel
allocates inside and frees again is not seen, except in :data:`HIDDEN_WEIGHTS`.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["weights", "adapter", "gradients", "optimiser", "logits", "gathered", "hessians", "activations"]
Bytes = Counter[str]
"""Bytes by kind."""

aten = torch.ops.aten
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
"""Operations whose result has a shape that depends on the values of a mask."""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that counts the bytes of all storages that operations make, until they are freed.

    Operations on small real tensors, such as token ids and masks, stay real: their values decide shapes. Peaks are kept
    by phase; the caller names the phase.

    Args:
        vocabulary: size of the vocabulary: tensors with so many columns are logits.
        next_token: the token that a fake model chooses, whatever its logits are.
    """

    def __init__(self, vocabulary: int, next_token: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.next_token = vocabulary, next_token
        self.phase = "start"
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: Bytes = Counter()
        self.peaks: dict[str, Bytes] = defaultdict(Counter)
        self._kinds: dict[int, tuple[str, int]] = {}
        self._resize = torch.UntypedStorage.resize_

    def hold(self, tensors: Any, kind: Kind) -> None:
        """Count tensors as of this kind; nested containers and DTensors are opened."""
        for storage in _storages(tensors):
            if storage._cdata in self._kinds:
                self._count(storage._cdata, -1)
            else:
                weakref.finalize(storage, self._drop, storage._cdata)
            self._kinds[storage._cdata] = (kind, storage.nbytes())
            self._count(storage._cdata, 1)

    def fake_weights(self, model: torch.nn.Module) -> None:
        """Give a model on the meta device fake weights, as if they lay in memory; shared ones stay shared."""
        fakes: dict[int, Any] = {}
        with self.mode:
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) not in fakes:
                        weight = torch.empty(parameter.shape, dtype=parameter.dtype)
                        fakes[id(parameter)] = (parameter, torch.nn.Parameter(weight, parameter.requires_grad))
                    if parameter is not None:
                        module._parameters[name] = fakes[id(parameter)][1]
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)

    def forget_peaks(self) -> None:
        """Forget the peaks so far."""
        self.peaks.clear()

    def _count(self, key: int, sign: int, hidden: int = 0) -> None:
        kind, size = self._kinds.get(key, ("activations", 0))
        self.live[kind] += sign * (size + hidden)
        if sign > 0 and self.live.total() > self.peaks[self.phase].total():
            self.peaks[self.phase] = self.live.copy()

    def _drop(self, key: int) -> None:
        if key in self._kinds:
            self._count(key, -1)
            del self._kinds[key]

    def __enter__(self) -> LiveMemory:
        resize, memory = self._resize, self

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            # FSDP frees gathered weights by setting their storage's size to 0.
            resize(storage, size)
            if storage._cdata in memory._kinds:
                memory._count(storage._cdata, -1)
                memory._kinds[storage._cdata] = ("gathered", size)
                memory._count(storage._cdata, 1)

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in INDEXED:  # by real masks: their values are known
            args = (args[0], list(_without_masks(args[1])), *args[2:])
        if args and isinstance(args[0], FakeTensor):  # what a fake tensor does not know
            if function is aten.argmax.default:
                return torch.full(args[0].shape[:-1], self.next_token)
            if function is aten._local_scalar_dense.default:
                return 0.0 if args[0].dtype.is_floating_point else 0
        if function in HIDDEN_WEIGHTS:
            hidden = HIDDEN_WEIGHTS[function](args)
            self._count(0, 1, hidden)
            self._count(0, -1, hidden)
        if function is aten.empty.memory_format:
            with self.mode:
                result = function(*args, **(kwargs or {}))
            if result.dim() == 1:  # so FSDP makes its buffers
                self.hold(result, "gathered")
        else:
            result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._kinds:
                is_logits = any(self._is_logits(leaf, storage) for leaf in tree_leaves(result))
                self._kinds[storage._cdata] = ("logits" if is_logits else "activations", storage.nbytes())
                weakref.finalize(storage, self._drop, storage._cdata)
                self._count(storage._cdata, 1)
        return result

    def _is_logits(self, tensor: Any, storage: torch.UntypedStorage) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.dim() > 1
            and tensor.shape[-1] == self.vocabulary
            and tensor.untyped_storage()._cdata == storage._cdata
        )


def _unpacked_weight(args: Any) -> int:
    """Bytes of the weight that bitsandbytes unpacks inside its product: it does so for more than some hundred rows."""
    rows, shape = args[0], args[2]
    return int(shape[0] * shape[1] * rows.element_size())


HIDDEN_WEIGHTS: dict[Any, Any] = {}
"""Operations that allocate a weight inside, and how many bytes, by their arguments."""


def know_bitsandbytes() -> None:
    """Let fake models compute with 4-bit weights."""
    import bitsandbytes  # noqa: F401  (registers its operations)

    HIDDEN_WEIGHTS[torch.ops.bitsandbytes.gemm_4bit.default] = _unpacked_weight


def _without_masks(indices: Any) -> Iterator[Any]:
    for index in indices:
        if index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor):
            yield from index.nonzero(as_tuple=True)
        else:
            yield index


def _storages(tensors: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, torch.Tensor):
            local = getattr(leaf, "_local_tensor", leaf)
            yield local.untyped_storage()
