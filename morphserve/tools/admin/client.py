"""The order to a server: look at what is in force, then name its revision."""

from __future__ import annotations

import argparse
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from math import inf, nan
from pathlib import Path
from typing import Any

from morphserve.errors import ConfigError
from morphserve.tools.command import command_parser, fail, finish, say
from morphserve.tools.watch import add_server, open_url, token_headers

_TIMEOUT_S = 30.0
_MAX_BYTES = 1 << 20


class NotOrdered(Exception):
    """The server has not taken it: the sentence says why."""


def order_parser(doc: str | None, prog: str) -> argparse.ArgumentParser:
    """Return a parser with what all orders have."""
    parser = command_parser(doc, prog)
    add_server(parser)
    parser.add_argument("--cause", default="", help="why, for the server's log and its status")
    return parser


def add_for(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """Add how long it holds; `otherwise`: what is so without the option, which is required where nothing is."""
    words = "; ".join(filter(None, ("seconds that it holds, a day at most", otherwise)))
    parser.add_argument("--for", dest="for_s", type=_seconds, required=not otherwise, metavar="S", help=words)


def _seconds(text: str) -> float:
    """Read a time that an order can hold; the longest is the server's to say.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        for_s = float(text)
    except ValueError:
        for_s = nan
    if not 0 < for_s < inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of seconds above 0, a day (86400) at most")
    return for_s


def run_order(action: str, args: argparse.Namespace, prog: str, keys: Sequence[str] = ("for_s",)) -> int:
    """Order it, print what is in force then, and return the exit status.

    Args:
        action: the last part of the route.
        args: the command line's.
        prog: the command, before its messages.
        keys: of the options that the body has, beside the cause.
    """
    body = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    try:
        done = send_order(args.url, args.token_file, action, {**body, "cause": args.cause})
    except NotOrdered as e:
        return fail(prog, e)
    for engine in done["engines"]:
        say(f"engine {engine['engine']}: {_in_words(engine)}")
    return finish(done)


def send_order(url: str, token_file: Path | None, action: str, body: dict[str, Any]) -> dict[str, Any]:
    """Look, then order; return the answer.

    Raises:
        NotOrdered: the server has not taken it, or there is none.
    """
    content = json.dumps({**body, "revision": order_state(url, token_file)["revision"]}).encode()
    return _ask(urllib.request.Request(f"{url}/morphserve/admin/{action}", content, _headers(token_file)))


def order_state(url: str, token_file: Path | None) -> dict[str, Any]:
    """Return what is in force: the revision of orders, and level, load and order of each engine.

    Raises:
        NotOrdered: the server does not say, or there is none.
    """
    return _ask(urllib.request.Request(f"{url}/morphserve/admin/state", headers=_headers(token_file)))


def _headers(token_file: Path | None) -> dict[str, str]:
    try:
        return {**token_headers(token_file), "Content-Type": "application/json"}
    except ConfigError as e:
        raise NotOrdered(str(e)) from e


def _ask(question: urllib.request.Request) -> dict[str, Any]:
    place = question.full_url
    try:
        with open_url(question, _TIMEOUT_S) as answer:
            told = json.loads(answer.read(_MAX_BYTES))
        if not (isinstance(told, dict) and told.keys() >= {"revision", "engines"}):
            raise ValueError
        return told
    except urllib.error.HTTPError as e:
        with e:
            raise NotOrdered(f"{place}: {_why(e)} (HTTP {e.code})") from e
    except ValueError as e:
        raise NotOrdered(f"{place} answers, but not as MorphServe. Is it vLLM's port? Name that with --url") from e
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        raise NotOrdered(f"{place}: no server answers ({getattr(reason, 'strerror', None) or reason})") from e


def _why(error: urllib.error.HTTPError) -> str:
    """Return what the server says, or what its code means."""
    if 300 <= error.code < 400:
        return "it sends whoever asks elsewhere, where no token is shown; name that with --url"
    try:
        told = json.loads(error.read(_MAX_BYTES))
        return str(told.get("error") or told["detail"])
    except (ValueError, KeyError, AttributeError, OSError):
        return "no answer of MorphServe"


def _in_words(engine: dict[str, Any]) -> str:
    level = f"level {engine['exposure_level']} of {engine['deepest_level']}"
    load = f"{engine['num_running']:,} running, {engine['num_waiting']:,} waiting"
    order = engine["order"]
    if order is None:
        return f"{level}, {load}; the policy decides"
    left = "" if order["left_s"] is None else f" for {order['left_s']:.0f} s"
    what = f"{order['kind']} level {order['level']}" if order["kind"] in ("pin", "max") else order["kind"]
    return f"{level}, {load}; in force: {what}{left}{', drained' if engine['drained'] else ''}"
