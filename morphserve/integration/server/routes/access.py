"""Who may see the status, and who may change something: a bearer token each, read from files of the operator's.

Without a token nothing can be changed, and the status is shown to the machine itself alone, without what files say.
vLLM's --api-key guards /v1 and its kind; it opens nothing here. There are no cookies, and a request from a web page of
another origin is refused, so that no browser can be made to ask for somebody else.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256

from fastapi import HTTPException, Request

from morphserve.config import AdminConfig
from morphserve.user_input import read_tokens

logger = logging.getLogger("vllm.morphserve")

_BETWEEN_LINES_S = 60.0
_MAX_SAID = 80  # characters of a path
# What a proxy adds. Behind one the peer's address is the proxy's, and says nothing of who asks.
_FORWARDED = ("forwarded", "via", "x-forwarded-", "x-real-ip")  # a name begins so
_OF_PROXIES = "1.0"  # of HTTP: nginx speaks it to what is behind it, by default, and adds no header; no browser does
_MEDIA_TYPES = ("application/json", "application/yaml")  # none of them can a page of another origin send unasked


class Refusals:
    """Tells of those who are refused, in one line a minute at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num = 0  # since the last line
        self._not_before_s = 0.0

    @contextmanager
    def told(self, request: Request) -> Iterator[None]:
        """Let a refusal out, and tell of it: of the address, and never of what was shown."""
        try:
            yield
        except HTTPException as e:
            self._num += 1
            now_s = self._clock()
            if now_s >= self._not_before_s:
                client = request.client.host if request.client else "a Unix socket"
                what = repr(f"{request.method} {request.url.path}"[:_MAX_SAID])
                said = "morphserve: %d requests since the last such line were refused; now %s from %s with %d"
                logger.warning(said, self._num, what, client, e.status_code)
                self._num, self._not_before_s = 0, now_s + _BETWEEN_LINES_S
            raise


@dataclass(frozen=True, slots=True)
class Access:
    """The rule. `admin` may read, too."""

    admin: str | None = None
    read: str | None = None
    refusals: Refusals = field(default_factory=Refusals, compare=False, repr=False)

    @classmethod
    def of(cls, config: AdminConfig) -> Access:
        """Return the rule that the settings ask for.

        Raises:
            ConfigError: a token's file cannot be used.
        """
        return cls(*read_tokens(config.token_file, config.read_token_file))

    def check_read(self, request: Request) -> bool:
        """Let somebody see the status; return whether with what files say.

        Raises:
            HTTPException: he may not.
        """
        with self.refusals.told(request):
            _refuse_other_origins(request)
            if self.admin or self.read:
                _check_bearer(request, (self.admin, self.read))
                return True
            if not _is_local(request):
                raise HTTPException(
                    403, "without a token the status is for this machine alone. Set admin.read_token_file"
                )
            return False

    def check_change(self, request: Request) -> None:
        """Let somebody change something.

        Raises:
            HTTPException: he may not, or a web page could have sent it.
        """
        with self.refusals.told(request):
            _refuse_other_origins(request)
            if not self.admin:
                raise HTTPException(403, "nothing can be changed from outside here: there is no admin.token_file")
            _check_bearer(request, (self.admin,))
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type not in _MEDIA_TYPES:
            raise HTTPException(415, f"Content-Type must be one of {', '.join(_MEDIA_TYPES)}")


def _check_bearer(request: Request, tokens: Iterable[str | None]) -> None:
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    digest, is_known = sha256(shown.strip().encode()).digest(), False
    for token in tokens:  # all of them, in the same time whichever it is
        is_known |= token is not None and hmac.compare_digest(digest, sha256(token.encode()).digest())
    if scheme.lower() != "bearer" or not is_known:
        remedy = "send Authorization: Bearer TOKEN, with the token of admin.token_file"
        raise HTTPException(401, f"a token is asked for: {remedy}", {"WWW-Authenticate": "Bearer"})


def _refuse_other_origins(request: Request) -> None:
    """Refuse what a browser sends for a page: our own page's requests, being GETs of its origin, carry no Origin."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    if "Origin" in request.headers or site not in ("none", "same-origin"):
        raise HTTPException(403, "a web page may not ask this. Ask from a shell")


def _is_local(request: Request) -> bool:
    """Return whether the peer is this machine, by no proxy that says so, and knows us by a name of this machine.

    The name is looked at because a page's own host name can be made to point to 127.0.0.1.
    """
    if request.scope.get("http_version") == _OF_PROXIES or any(n.startswith(_FORWARDED) for n in request.headers):
        return False
    peer = request.client.host if request.client else ""  # a Unix socket has none
    host = request.headers.get("Host", "")
    name = host[: host.rindex("]")].lstrip("[") if "]" in host else host.partition(":")[0]
    return (not peer or _is_loopback(peer)) and (name == "localhost" or _is_loopback(name))


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_loopback or bool(getattr(found, "ipv4_mapped", None) and found.ipv4_mapped.is_loopback)
