"""What a server would be, without one: in which dtype, on how many ranks, compiled or not, and of which formats."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from morphserve.prepared import Place


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON document: {"place", "formats", "in_pages"}. Its words are those of `vllm serve`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from morphserve.control import DEFAULT_FORMATS
    from morphserve.integration.start import FOUND, KEY, default_formats, serving_residence

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="served", conflict_handler="resolve"))
    args = EngineArgs.from_cli_args(parser.parse_args(argv))
    args.additional_config = {KEY: {"policy": {"kind": "static", "level": 0}, "prepared": False}}
    place: Place = getattr(args.create_engine_config(), FOUND).place
    document = {
        "place": asdict(place),
        "formats": list(default_formats() or DEFAULT_FORMATS),
        "in_pages": serving_residence().in_pages,
    }
    sys.stdout.write("\n" + json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
