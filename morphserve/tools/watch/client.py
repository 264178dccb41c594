"""The question to the server: its status page, or one sentence on why there is none; and the token that it may want."""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from morphserve.errors import ConfigError
from morphserve.user_input import read_token

DEFAULT_URL = "http://127.0.0.1:8000"
TOKEN_FILE = "MORPHSERVE_TOKEN_FILE"
_TIMEOUT_S = 5.0
_PATIENCE_S = 10.0  # with a server whose engines have not answered since they were asked
_POLL_S = 0.1
_SOMETHING_ELSE = "{} answers, but not with a status: is it vLLM's port? Name that with --url."
_MAX_BYTES = 16 << 20  # a status is some kilobytes an engine


class NoStatus(Exception):
    """The server has no status to show: the sentence says what to do."""


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server, and with which token."""
    parser.add_argument("--url", type=server_url, default=DEFAULT_URL, help=f"of the server, by default {DEFAULT_URL}")
    words = f"file (0600) with the token that the server wants, by default what {TOKEN_FILE} names"
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=words)


def token_headers(token_file: Path | None = None) -> dict[str, str]:
    """Return the headers that show the token of a file, or of the one that the environment names, if there is one.

    Raises:
        ConfigError: the file holds none, or others can read it.
    """
    found = token_file or os.environ.get(TOKEN_FILE)
    return {"Authorization": f"Bearer {read_token(Path(found))}"} if found else {}


def server_url(text: str) -> str:
    """Read a server's address; without a scheme it is http.

    Raises:
        ArgumentTypeError: it is none.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        port_is_one = False
    if not port_is_one or parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a server; give one such as {DEFAULT_URL}")
    return url.rstrip("/")


def open_url(question: str | urllib.request.Request, timeout_s: float) -> Any:
    """Ask a server, as `urllib.request.urlopen` does; a context manager with the answer.

    It alone is asked, as a token is nobody else's: a redirect is an `HTTPError`, and what is on this machine is reached
    by no proxy, whatever the environment says of proxies.

    Raises:
        URLError: as `urlopen` does, or another OSError.
    """
    request = question if isinstance(question, urllib.request.Request) else urllib.request.Request(question)
    no_proxies = [urllib.request.ProxyHandler({})] if _is_this_machine(request.full_url) else []
    return urllib.request.build_opener(_StaysHere, *no_proxies).open(request, timeout=timeout_s)


class _StaysHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def _is_this_machine(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def fetch_status(url: str, token_file: Path | None = None) -> dict[str, Any]:
    """Return what `GET /morphserve/status` answers.

    Raises:
        NoStatus: nobody answers, or somebody else than a server with the plugin; or it wants another token.
    """
    try:
        question = urllib.request.Request(f"{url}/morphserve/status", headers=token_headers(token_file))
        with open_url(question, _TIMEOUT_S) as answer:
            document = json.loads(answer.read(_MAX_BYTES))
    except urllib.error.HTTPError as e:
        with e:
            raise NoStatus(_refusal(url, e.code)) from e
    except ConfigError as e:
        raise NoStatus(str(e)) from e
    except ValueError as e:
        raise NoStatus(_SOMETHING_ELSE.format(url)) from e
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise NoStatus(f"no server answers at {url} ({cause}). Start it, or name another with --url.") from e
    if not _is_status(document):
        raise NoStatus(_SOMETHING_ELSE.format(url))
    return dict(document)


def fetch_status_from_now(url: str) -> dict[str, Any]:
    """Return a status of a poll that begins from now on, with the token that the environment names.

    Raises:
        NoStatus: there is none; or the engines do not answer.
    """
    begin_s = time.monotonic()
    while (waited_s := time.monotonic() - begin_s) < _PATIENCE_S:
        status = fetch_status(url)
        if status.get("age_s", 0.0) <= time.monotonic() - begin_s:
            return status
        time.sleep(_POLL_S)
    raise NoStatus(f"the engines behind {url} have not answered for {waited_s:.0f} s: they hang, or step long.")


def _is_status(document: Any) -> bool:
    """Return whether it looks like what one engine, or several, say of themselves."""
    engines = document.get("engines", [document]) if isinstance(document, dict) else None
    return isinstance(engines, list) and all(isinstance(each, dict) and "level" in each for each in engines)


def _refusal(url: str, code: int) -> str:
    if code in (404, 503):
        return f"{url} serves without MorphServe (HTTP {code}). Start it with `vllm serve MODEL --plugin morphserve`."
    if code == 401:
        return f"{url} wants a token, or another one (HTTP {code}). Name its file by --token-file, or in {TOKEN_FILE}."
    if code == 403:
        return f"{url} does not show its status to everybody (HTTP {code}). Ask on its own machine, or give it a token."
    if 300 <= code < 400:
        return f"{url} sends whoever asks elsewhere (HTTP {code}), where no token is shown. Name that with --url."
    return f"{url} answers with HTTP {code} instead of a status. Its log says why."
