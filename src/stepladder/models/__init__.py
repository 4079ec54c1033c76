"""Models: where weights are, how they are loaded, in which number format they compute, how a chat becomes tokens."""

from stepladder.models.libraries import quiet, release_cards, require
from stepladder.models.loading import load, load_in_4_bits, load_tokenizer, skeleton
from stepladder.models.location import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BUNDLED,
    BUNDLED_FILE,
    BUNDLED_PACKAGE,
    DIGESTS_FILE,
    cache_folder,
    content_digest,
    identity,
    is_adapter,
    locate,
    locate_adapter,
)
from stepladder.models.number_format import (
    DTYPE_VARIABLE,
    compute_dtype,
    dtype_name,
    has_avx512,
    has_cuda,
    machine,
    multiplies_bfloat16,
    own_dtype,
)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BUNDLED",
    "BUNDLED_FILE",
    "BUNDLED_PACKAGE",
    "DIGESTS_FILE",
    "DTYPE_VARIABLE",
    "cache_folder",
    "compute_dtype",
    "content_digest",
    "dtype_name",
    "has_avx512",
    "has_cuda",
    "identity",
    "is_adapter",
    "load",
    "load_in_4_bits",
    "load_tokenizer",
    "locate",
    "locate_adapter",
    "machine",
    "multiplies_bfloat16",
    "own_dtype",
    "quiet",
    "release_cards",
    "require",
    "skeleton",
]
