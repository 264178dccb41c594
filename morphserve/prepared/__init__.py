"""What `morphserve prepare` has measured, kept by what it was measured of: found at start, and never another's.

`weights` names a model by its tensors, `place` names where and how it is served, `entries` says what of the two an
entry must share with who asks, `store` keeps entries in the cache directory, beside those that come with the package.
"""

from __future__ import annotations

from morphserve.prepared.entries import ProfileKey, StoredProfile, StoredTimes, TimesKey
from morphserve.prepared.place import Place, this_machine, vllm_version
from morphserve.prepared.store import Store, newest, sealed
from morphserve.prepared.weights import weights_fingerprint

__all__ = [
    "Place",
    "ProfileKey",
    "Store",
    "StoredProfile",
    "StoredTimes",
    "TimesKey",
    "newest",
    "sealed",
    "this_machine",
    "vllm_version",
    "weights_fingerprint",
]
