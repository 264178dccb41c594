"""What `morphserve prepare` has measured, kept by what it was measured of: found at start, and never another's.

`weights` names a model by its tensors, `place` names where and how it is served, `entries` says what of the two an
entry must share with who asks, `store` keeps entries in the cache directory, beside those that come with the package,
and `lookup` chooses. `when_idle` has a server's spare time used for what is missing, by a child (`background`) under a
`lock`.
"""

from __future__ import annotations

from morphserve.prepared.background import Background
from morphserve.prepared.entries import ProfileKey, StoredProfile, StoredTimes, TimesKey
from morphserve.prepared.lock import TAKEN, TakenError, take_host, take_model
from morphserve.prepared.lookup import Findings, Prepared, find_prepared, find_profile, find_times
from morphserve.prepared.place import Place, this_machine, vllm_version
from morphserve.prepared.store import SHIPPED, Store, moment
from morphserve.prepared.weights import weights_fingerprint
from morphserve.prepared.when_idle import WhenIdle

__all__ = [
    "SHIPPED",
    "TAKEN",
    "Background",
    "Findings",
    "Place",
    "Prepared",
    "ProfileKey",
    "Store",
    "StoredProfile",
    "StoredTimes",
    "TakenError",
    "TimesKey",
    "WhenIdle",
    "find_prepared",
    "find_profile",
    "find_times",
    "moment",
    "take_host",
    "take_model",
    "this_machine",
    "vllm_version",
    "weights_fingerprint",
]
